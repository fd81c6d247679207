//! Route matchers (headers, paths and query parameters), compared with Envoy.

use std::net::Ipv4Addr;

use serde_json::{Value, json};
use weft_integration::bootstrap::{any, with};
use weft_integration::port;

use crate::comparison::{Case, compare, host, listener, manager, table_of};
use crate::random::Random;

/// Header names of matchers and requests.
const NAMES: &[&str] = &[
    "x-one",
    "X-One",
    "x-one",
    "x-two",
    "cookie",
    "accept",
    "user-agent",
    "content-type",
    "origin",
    "via",
    "x-forwarded-for",
    "content-length",
    "from",
];
const PSEUDO: &[&str] = &[":path", ":method", ":scheme", ":authority", "host", ":protocol"];
const VALUES: &[&str] = &[
    "",
    "a",
    "A",
    "b",
    "ab",
    "aB",
    "a b",
    "abc",
    "a,b",
    "a, b",
    "cab",
    "1",
    "-1",
    "+1",
    "01",
    "10",
    "1.0",
    "9223372036854775807",
    "9223372036854775808",
    "é",
    "É",
    "\t",
    "a=1; b=2",
];
const PSEUDO_VALUES: &[&str] = &[
    "/", "/a", "/a?q=1", "?q=1", "GET", "get", "POST", "http", "https", ".example", "m1", "/A", "a",
];
const REGEXES: &[&str] = &[
    "a",
    "a|ab",
    "a.*",
    ".*",
    ".",
    "..",
    "[^a]*",
    "(?i)A.?",
    r"\d+",
    r"-?\d",
    r"\w+",
    r"\s*",
    "[a-c]+",
    "a{1,2}b?",
    "(a|b)*",
    "^a$",
    "/a",
    "/.*q=1",
    "GET|POST",
    "é",
    "[é]+",
    r".*\.example",
    "a\\x62",
    r"\S+",
    "(?:a)(?-i:B)",
    "",
    r"\bab\b",
    r"\Aa\z",
    "[[:alpha:]]+",
    r"a\Qb\E",
    "a{2",
    "x*",
];

/// A `StringMatcher`. Only `exact` may be empty; otherwise it becomes a regular expression, without `ignore_case`.
pub(crate) fn string_match(random: &mut Random, values: &[&str]) -> Value {
    let value = random.of(values);
    let form = *random.of(&["exact", "exact", "prefix", "suffix", "contains", "safe_regex"]);
    if form == "safe_regex" || (form != "exact" && value.is_empty()) {
        return json!({"safe_regex": {"regex": regex(random)}});
    }
    let matcher = json!({form: value});
    if random.one_in(3) { with(matcher, "ignore_case", json!(true)) } else { matcher }
}

/// A regular expression that both proxies accept.
pub(crate) fn regex(random: &mut Random) -> &'static str {
    loop {
        let regex = *random.of(REGEXES);
        // Both refuse empty expressions; weft alone refuses quoting (`\Q`) and an unclosed brace.
        if !regex.is_empty() && !regex.contains("\\Q") && regex != "a{2" {
            return regex;
        }
    }
}

/// A `HeaderMatcher`.
pub(crate) fn header_match(random: &mut Random) -> Value {
    let is_pseudo = random.one_in(4);
    let (names, values) = if is_pseudo { (PSEUDO, PSEUDO_VALUES) } else { (NAMES, VALUES) };
    let matcher = json!({"name": random.of(names)});
    let matcher = match random.below(12) {
        0 => matcher,
        1 => with(matcher, "present_match", json!(true)),
        2 => with(matcher, "present_match", json!(false)),
        3 => {
            let bounds = ["-9223372036854775808", "-1", "0", "1", "2", "10", "9223372036854775807"];
            let range = json!({"start": random.of(&bounds), "end": random.of(&bounds)});
            with(matcher, "range_match", range)
        }
        4 => {
            let value = random.of(values);
            let form =
                *random.of(&["exact_match", "prefix_match", "suffix_match", "contains_match"]);
            let form = if value.is_empty() { "exact_match" } else { form };
            with(matcher, form, json!(value))
        }
        5 => with(matcher, "safe_regex_match", json!({"regex": regex(random)})),
        _ => with(matcher, "string_match", string_match(random, values)),
    };
    let matcher = match random.one_in(3) {
        true => with(matcher, "invert_match", json!(true)),
        false => matcher,
    };
    match random.one_in(4) {
        true => with(matcher, "treat_missing_header_as_empty", json!(true)),
        false => matcher,
    }
}

/// Random header lines.
pub(crate) fn lines(random: &mut Random) -> Vec<u8> {
    let mut lines = Vec::new();
    for _ in 0..random.below(4) {
        let name = *random.of(NAMES);
        // `content-length` would change the framing of the request.
        if name == "content-length" {
            continue;
        }
        for _ in 0..=random.below(2) {
            lines.extend_from_slice(name.as_bytes());
            lines.extend_from_slice(b": ");
            match random.one_in(12) {
                true => lines.extend_from_slice(b"a\xff"),
                false => lines.extend_from_slice(random.of(VALUES).as_bytes()),
            }
            lines.extend_from_slice(b"\r\n");
        }
    }
    if random.one_in(6) {
        let proto = random.of(&["http", "https", "HTTP", "ftp"]);
        lines.extend_from_slice(format!("x-forwarded-proto: {proto}\r\n").as_bytes());
    }
    lines
}

/// A random request to a host.
pub(crate) fn request(random: &mut Random, target: &str, host: &str) -> Vec<u8> {
    let method = *random.of(&["GET", "GET", "GET", "POST", "HEAD", "DELETE"]);
    let mut request = format!("{method} {target} HTTP/1.1\r\nhost: {host}\r\n").into_bytes();
    request.extend(lines(random));
    let body = random.of(&["", "content-length: 0\r\n", "content-length: 1\r\n"]);
    let has_body = method == "POST";
    if has_body {
        request.extend_from_slice(body.as_bytes());
    }
    request.extend_from_slice(b"\r\n");
    if has_body && body.contains('1') {
        request.push(b'x');
    }
    request
}

pub(crate) const TARGETS: &[&str] = &["/", "/a", "/A", "/a?q=1", "/ab", "/a/b?q=1&q=2"];

/// Random requests for each matcher.
fn cases(
    random: &mut Random,
    matches: &[Value],
    port: u16,
    each: usize,
    targets: &[&str],
) -> Vec<Case> {
    let mut cases = Vec::new();
    for (number, matcher) in matches.iter().enumerate() {
        for _ in 0..each {
            let target = *random.of(targets);
            cases.push(Case::new(matcher, port, request(random, target, &host(number))));
        }
    }
    cases
}

fn check(seed: u64, matches: &[Value], each: usize, targets: &[&str]) {
    let port = port::free();
    let at = (Ipv4Addr::LOCALHOST, port).into();
    let listener = listener(at, manager(&table_of(matches), &[], &json!({})));
    let cases = cases(&mut Random::new(seed), matches, port, each, targets);
    compare(&[listener], port, &cases, matches.len() * each);
}

#[test]
fn route_header_matchers_match_as_in_envoy() {
    let mut random = Random::new(1);
    let matches: Vec<Value> = (0..400)
        .map(|_| {
            let headers: Vec<Value> =
                (0..=random.below(4) / 3).map(|_| header_match(&mut random)).collect();
            json!({"prefix": "/", "headers": headers})
        })
        .collect();
    check(2, &matches, 12, TARGETS);
}

const PATHS: &[&str] = &[
    "", "/", "/a", "/A", "/a/", "/ab", "/aB", "/a/b", "/A/B/", "/a.b", "/a?", "/a?q", "a", "/b",
    "/~a", "/a,b", "/a:b", "/a/b/c", "//",
];
const PATH_REGEXES: &[&str] = &[
    "/",
    "/a",
    "/a.*",
    "/[aA]/?",
    "(?i)/AB?",
    "/a/[^/]+",
    ".*/b",
    "/.+",
    "/a\\.b",
    "/(a|ab)(/b)?",
    ".*q.*",
];
pub(crate) const PATH_TARGETS: &[&str] = &[
    "/",
    "/a",
    "/A",
    "/a/",
    "/ab",
    "/aB",
    "/AB",
    "/abc",
    "/a/b",
    "/A/b",
    "/a/b/",
    "/a/b/c",
    "/a.b",
    "/a?q",
    "/a?",
    "/b?p=/a",
    "/a/b?/a/b",
    "/~a",
    "/a,b",
    "/a:b",
    "/?/a",
    "/b",
];

pub(crate) fn path_match(random: &mut Random) -> Value {
    let path = *random.of(PATHS);
    let matches = match random.below(5) {
        0 => json!({"prefix": path}),
        1 => json!({"path": path}),
        2 if path.len() > 1 && !path.ends_with('/') && !path.contains('?') => {
            json!({"path_separated_prefix": path})
        }
        3 => {
            let template = random.of(&["/*", "/a/*", "/*/b", "/a/**", "/{x}/{y=*}", "/A", "/**"]);
            let kind = "envoy.extensions.path.match.uri_template.v3.UriTemplateMatchConfig";
            json!({"path_match_policy": {
                "name": "envoy.path.match.uri_template.uri_template_matcher",
                "typed_config": any(kind, json!({"path_template": template}))}})
        }
        _ => json!({"safe_regex": {"regex": random.of(PATH_REGEXES)}}),
    };
    match random.below(3) {
        0 => with(matches, "case_sensitive", json!(false)),
        1 => with(matches, "case_sensitive", json!(true)),
        _ => matches,
    }
}

#[test]
fn route_path_matchers_match_as_in_envoy() {
    let mut random = Random::new(3);
    let matches: Vec<Value> = (0..200).map(|_| path_match(&mut random)).collect();
    check(4, &matches, 16, PATH_TARGETS);
}

pub(crate) fn query_match(random: &mut Random) -> Value {
    let matcher = json!({"name": random.of(&["q", "q", "x", "Q", "%71", "q "])});
    match random.below(5) {
        0 => matcher,
        1 => with(matcher, "present_match", json!(true)),
        2 => with(matcher, "present_match", json!(false)),
        _ => {
            let values = ["", "1", "a", "A", "ab", "%31", "1=2", "a+b", "2", "/"];
            with(matcher, "string_match", string_match(random, &values))
        }
    }
}

const QUERY_PIECES: &[&str] = &[
    "q", "q=", "q=1", "q=2", "q=a", "q=A", "q=ab", "q=%31", "%71=1", "Q=1", "x=1", "x", "", "=1",
    "q=1=2", "q=a+b", "q=1?q=2", "qq=1", "a;q=1", "q=/",
];

#[test]
fn route_query_matchers_match_as_in_envoy() {
    let mut random = Random::new(5);
    let matches: Vec<Value> = (0..200)
        .map(|_| {
            let all: Vec<Value> =
                (0..=random.below(4) / 3).map(|_| query_match(&mut random)).collect();
            json!({"prefix": "/", "query_parameters": all})
        })
        .collect();
    let targets: Vec<String> = (0..300)
        .map(|_| {
            let pieces: Vec<&str> =
                (0..random.below(4)).map(|_| *random.of(QUERY_PIECES)).collect();
            let mark = if random.one_in(8) && pieces.is_empty() { "" } else { "?" };
            format!("/a{mark}{}", pieces.join("&"))
        })
        .collect();
    check(6, &matches, 16, &targets.iter().map(String::as_str).collect::<Vec<_>>());
}

/// Only where upgrades are enabled: elsewhere Envoy refuses the request, and weft ignores the offer (`tests/upgrades`).
#[test]
fn websocket_upgrade_headers_match_as_in_envoy() {
    let header = |matcher: Value| json!({"prefix": "/", "headers": [matcher]});
    let matches = [
        header(json!({"name": "upgrade", "string_match": {"exact": "websocket"}})),
        header(json!({"name": "Upgrade", "present_match": true})),
        header(json!({"name": "upgrade", "present_match": false})),
        header(json!({"name": "upgrade", "string_match": {"exact": "h2c"}, "invert_match": true})),
        header(json!({"name": "connection", "present_match": true})),
        header(json!({"name": "connection",
            "string_match": {"contains": "upgrade", "ignore_case": true}})),
        header(json!({"name": "sec-websocket-version", "range_match": {"start": 13, "end": 14}})),
    ];
    let lines = [
        "",
        "connection: keep-alive\r\n",
        "connection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n\
            sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n",
    ];
    let port = port::free();
    let at = (Ipv4Addr::LOCALHOST, port).into();
    let served = json!({"upgrade_configs": [{"upgrade_type": "websocket"}]});
    let listener = listener(at, manager(&table_of(&matches), &[], &served));
    let mut cases = Vec::new();
    for (number, matcher) in matches.iter().enumerate() {
        for lines in lines {
            let head = format!("GET / HTTP/1.1\r\nhost: {}\r\n{lines}\r\n", host(number));
            cases.push(Case::new(matcher, port, head.into_bytes()));
        }
    }
    compare(&[listener], port, &cases, 21);
}
