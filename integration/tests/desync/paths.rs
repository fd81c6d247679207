//! A path that may not be reached is not reached, however it is written: what is authorized is what the
//! service gets.

use serde_json::{Value, json};
use weft_integration::bootstrap::any;

use crate::client::Client;
use crate::front::Front;

const DENIED: &str = "/admin";
const PATHS: usize = 10_000;

/// What nobody reads in two ways.
const PLAIN: [&str; 20] = [
    "/",
    "/",
    "/",
    "x",
    "public",
    "admin",
    "/admin",
    "/admin/x",
    "adm",
    "in",
    "a.b",
    "~",
    "%20",
    "%C3%A9",
    "?",
    "?x=/../admin",
    "&",
    "=",
    "@",
    "-",
];
/// What has another form that means the same (RFC 3986, section 6.2.2).
const DOTTED: [&str; 22] = [
    ".",
    "..",
    "/.",
    "/..",
    "/./",
    "/../",
    "//",
    "///",
    "%2e",
    "%2E",
    "%2e%2E",
    ".%2e",
    "/%2e%2e/",
    "/x/..",
    "%61",
    "%61dmin",
    "ad%6Din",
    "%61%64%6d%69%6E",
    "%7e",
    "%2D",
    "...",
    "%c3%a9",
];
/// What some read as something else.
const DOUBTFUL: [&str; 32] = [
    "%2f",
    "%2F",
    "%5c",
    "%5C",
    "\\",
    "..\\",
    "%00",
    "\0",
    "#",
    "%23",
    "%3f",
    "%3B",
    ";",
    ";x",
    ";x=y",
    "..;",
    "..;/",
    ".;x/",
    "%",
    "%z",
    "%zz",
    "%252e",
    "%2561dmin",
    "%252f",
    "\u{e9}",
    "\u{2024}",
    "\u{ff0f}",
    "%c0%ae",
    "%c0%af",
    "%u002f",
    "\t",
    " ",
];

/// Numbers without order, the same at each run.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, end: usize) -> usize {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).expect("31 bits") % end
    }

    fn piece(&mut self, doubts: usize) -> &'static str {
        // One in so many is of the next kind.
        match (doubts, self.below(4)) {
            (2, 0) => DOUBTFUL[self.below(DOUBTFUL.len())],
            (1 | 2, 1) => DOTTED[self.below(DOTTED.len())],
            _ => PLAIN[self.below(PLAIN.len())],
        }
    }

    fn path(&mut self) -> String {
        let (doubts, pieces) = (self.below(3), self.below(8));
        (0..pieces).map(|_| self.piece(doubts)).fold("/".to_owned(), |path, piece| path + piece)
    }
}

/// The one form of a path, by another way than the sidecar's: decoded once, whatever separates is a
/// slash, and no segment is empty or dots.
fn resolved(target: &str, parameters: bool) -> String {
    let path = target.split('?').next().unwrap_or_default();
    let decoded = String::from_utf8_lossy(&decoded(path.as_bytes())).replace('\\', "/");
    let mut kept: Vec<&str> = Vec::new();
    for segment in decoded.split('/') {
        let segment =
            if parameters { segment } else { segment.split(';').next().unwrap_or_default() };
        match segment {
            "" | "." => {}
            ".." => drop(kept.pop()),
            other => kept.push(other),
        }
    }
    format!("/{}", kept.join("/"))
}

fn decoded(path: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut rest = path;
    while let [first, behind @ ..] = rest {
        let pair = behind.get(..2).and_then(|pair| std::str::from_utf8(pair).ok());
        let escaped =
            pair.filter(|_| *first == b'%').and_then(|pair| u8::from_str_radix(pair, 16).ok());
        out.push(escaped.unwrap_or(*first));
        rest = if escaped.is_some() { &behind[2..] } else { behind };
    }
    out
}

fn deny() -> Value {
    json!({"name": "rbac", "typed_config": any("envoy.extensions.filters.http.rbac.v3.RBAC", json!({
        "rules": {"action": "DENY", "policies": {"nobody": {
            "permissions": [{"url_path": {"path": {"prefix": DENIED}}}],
            "principals": [{"any": true}],
        }}},
    }))})
}

/// How many were served, denied and refused.
type Counts = [usize; 3];

/// Asks for a path. What is wrong about what came of it.
fn check(client: &mut Client, path: &str, counts: &mut Counts) -> Result<(), String> {
    client.send(format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes());
    let answer = client.answer(false).ok_or("it was not answered")?;
    let meant = resolved(path, true);
    match answer.status {
        200 => {
            counts[0] += 1;
            let target = answer.body.strip_prefix("GET ").and_then(|echo| echo.strip_suffix(" a"));
            let got = resolved(target.ok_or("the service got something else")?, true);
            if got.starts_with(DENIED) || got != meant {
                return Err(format!("the service got {:?}, which is {got}", answer.body));
            }
        }
        403 => {
            counts[1] += 1;
            if !meant.starts_with(DENIED) {
                return Err(format!("it was denied, and is {meant}"));
            }
        }
        400 => counts[2] += 1,
        other => return Err(format!("{other} {}", answer.body)),
    }
    Ok(())
}

/// The segments of a path, by a service that decodes it `times` times, and then takes whatever
/// separates for a slash; or, with `apart`, that decodes what stands between slashes.
fn segments(path: &str, times: usize, apart: bool) -> Vec<String> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if apart {
        return path.split('/').map(|s| text(&decoded(s.as_bytes())).replace('/', "%2F")).collect();
    }
    let bytes = (0..times).fold(path.as_bytes().to_vec(), |bytes, _| decoded(&bytes));
    let separators: &[char] = if times == 0 { &['/'] } else { &['/', '\\'] };
    text(&bytes).split(separators).map(str::to_owned).collect()
}

/// What services of many kinds take a target for.
fn seen_by_services(target: &str) -> Vec<String> {
    let path = target.split('?').next().unwrap_or_default();
    let mut seen = Vec::new();
    for (times, apart) in [(0, false), (1, false), (2, false), (1, true)] {
        for shape in 0..8 {
            let [cuts, merges, resolves] = [1, 2, 4].map(|bit| shape & bit != 0);
            let mut kept: Vec<String> = Vec::new();
            for segment in segments(path, times, apart).iter().skip(1) {
                let bare = segment.split(';').next().unwrap_or_default();
                match if cuts { bare } else { segment } {
                    "" if merges => {}
                    "." if resolves => {}
                    ".." if resolves => drop(kept.pop()),
                    other => kept.push(other.to_owned()),
                }
            }
            seen.push(format!("/{}", kept.join("/")));
        }
    }
    seen
}

/// A path whose query has in encoded form what no query may have as it is (RFC 3986, section 3.4).
fn with_encoded_query(target: &str) -> String {
    match target.split_once('?') {
        Some((path, query)) => format!("{path}?{}", query.replace('\\', "%5C")),
        None => target.to_owned(),
    }
}

/// Asks for a path that is to reach the service as it is. What is wrong about what came of it.
fn check_as_sent(client: &mut Client, path: &str, counts: &mut Counts) -> Result<(), String> {
    client.send(format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes());
    let answer = client.answer(false).ok_or("it was not answered")?;
    let denied = seen_by_services(path).into_iter().find(|seen| seen.starts_with(DENIED));
    match (answer.status, denied) {
        (200, None) if answer.body == format!("GET {} a", with_encoded_query(path)) => {
            counts[0] += 1;
        }
        (200, None) => return Err(format!("the service got {:?}", answer.body)),
        (200, Some(seen)) => return Err(format!("it was served, and some services see {seen}")),
        (403, Some(_)) => counts[1] += 1,
        (403, None) => return Err("it was denied".into()),
        (400, _) => counts[2] += 1,
        (other, _) => return Err(format!("{other} {}", answer.body)),
    }
    Ok(())
}

/// Asks for a path that may be changed on its way. What is wrong about what came of it.
fn check_changed(client: &mut Client, path: &str, counts: &mut Counts) -> Result<(), String> {
    client.send(format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes());
    let answer = client.answer(false).ok_or("it was not answered")?;
    match answer.status {
        200 => {
            let target = answer.body.strip_prefix("GET ").and_then(|echo| echo.strip_suffix(" a"));
            let target = target.ok_or("the service got something else")?;
            let denied = seen_by_services(target).into_iter().find(|seen| seen.starts_with(DENIED));
            counts[0] += 1;
            denied.map_or(Ok(()), |seen| Err(format!("{target} was served, some see {seen}")))
        }
        403 => {
            counts[1] += 1;
            let denied = seen_by_services(path).iter().any(|seen| seen.starts_with(DENIED));
            if denied { Ok(()) } else { Err("it was denied".into()) }
        }
        400 => {
            counts[2] += 1;
            Ok(())
        }
        other => Err(format!("{other} {}", answer.body)),
    }
}

/// Asks for very many paths where ambiguous ones are refused, a connection after the other.
fn run(settings: &Value, at_least: Counts) {
    run_with(settings, &json!({"path": "strict"}), check, at_least);
}

fn run_with(
    settings: &Value,
    ours: &Value,
    check: fn(&mut Client, &str, &mut Counts) -> Result<(), String>,
    at_least: Counts,
) {
    let mut front = Front::start(&[deny()], settings, ours);
    let (mut numbers, mut counts) = (Numbers(4), [0; 3]);
    let mut client = front.client();
    let mut broken = Vec::new();
    for _ in 0..PATHS {
        let path = numbers.path();
        let refused = counts[2];
        let wrong = check(&mut client, &path, &mut counts).err();
        if wrong.is_some() || counts[2] > refused {
            client = front.client();
        }
        broken.extend(wrong.map(|why| format!("{path:?}: {why}")));
    }
    assert!(broken.is_empty(), "{} paths:\n{}", broken.len(), broken.join("\n"));
    let enough = counts.iter().zip(at_least).all(|(count, least)| *count >= least);
    assert!(enough, "served, denied, refused: {counts:?}, which says too little");
    let violations = front.recorder.take().violations;
    assert!(violations.is_empty(), "{violations:?}");
    front.assert_healthy();
}

#[test]
fn what_is_denied_is_not_reached_where_ambiguous_paths_are_refused() {
    run(&json!({}), [1000, 200, 1000]);
}

#[test]
fn what_is_denied_is_not_reached_where_other_ambiguous_paths_are_refused() {
    run(&json!({"normalize_path": true, "merge_slashes": true}), [1000, 200, 1000]);
    let decodes = "UNESCAPE_AND_FORWARD";
    let settings = json!({"normalize_path": true, "merge_slashes": true,
        "path_with_escaped_slashes_action": decodes});
    run(&settings, [1000, 200, 1000]);
}

#[test]
fn what_is_denied_is_not_reached_where_paths_are_normalized_as_by_envoy() {
    let settings = json!({"normalize_path": true, "merge_slashes": true});
    run_with(&settings, &json!({}), check_changed, [1000, 200, 50]);
}

#[test]
fn what_is_denied_is_not_reached_where_slashes_are_decoded_as_by_envoy() {
    let settings = json!({"normalize_path": true, "merge_slashes": true,
        "path_with_escaped_slashes_action": "UNESCAPE_AND_FORWARD"});
    run_with(&settings, &json!({}), check_changed, [1000, 200, 50]);
}

#[test]
fn denied_path_is_not_reached_where_paths_are_sent_on_unchanged() {
    run_with(&json!({}), &json!({"path": "as_sent"}), check_as_sent, [1000, 200, 100]);
}

#[test]
fn denied_path_is_not_reached_by_a_file_without_settings_of_paths() {
    run_with(&json!({}), &json!({}), check_as_sent, [1000, 200, 100]);
}

#[test]
fn everyday_paths_reach_the_service_unchanged() {
    for ours in [json!({}), json!({"path": "as_sent"})] {
        check_everyday_paths(&Front::start(&[deny()], &json!({}), &ours));
    }
}

fn check_everyday_paths(front: &Front) {
    let mut client = front.client();
    for path in [
        "/@babel%2fcore",
        "/%40babel%2Fcore",
        "/group%2Fproject",
        "/vhosts/%2F/queues",
        "/bucket//key",
        "/%7Euser",
        "/%2E",
        "/%2e%2e/",
        "//",
        "/100%",
        "/a;v=1/b?x=%2F%2e",
    ] {
        let mut counts = [0; 3];
        check_as_sent(&mut client, path, &mut counts).expect(path);
        assert_eq!(counts, [1, 0, 0], "{path}");
    }
}

#[test]
fn escaped_slashes_are_redirected_where_that_is_set() {
    let settings = json!({"path_with_escaped_slashes_action": "UNESCAPE_AND_REDIRECT"});
    let front = Front::start(&[deny()], &settings, &json!({"path": "as_sent"}));
    let mut client = front.client();
    for (path, status) in [("/a%2fb?x=%2F", 307), ("/a%5Cb", 307), ("/a/b?x=%2F", 200)] {
        client.send(format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes());
        assert_eq!(client.answer(false).map(|answer| answer.status), Some(status), "{path}");
    }
}

/// Servlet containers cut off what stands behind `;` before they look at a segment, which may then be
/// empty.
#[test]
fn what_is_denied_is_not_reached_by_segments_of_parameters() {
    for (settings, ours) in [
        (json!({}), json!({})),
        (json!({}), json!({"path": "strict"})),
        (json!({"normalize_path": true, "merge_slashes": true}), json!({})),
        (json!({"normalize_path": true, "merge_slashes": true}), json!({"path": "strict"})),
    ] {
        let front = Front::start(&[deny()], &settings, &ours);
        for path in
            ["/;/admin", "/;x/admin", "/;x=y/admin", "/;;/admin/x", "/x/..;/admin", "/.;/admin"]
        {
            assert!(resolved(path, false).starts_with(DENIED), "{path}");
            let mut client = front.client();
            client.send(format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes());
            let answer = client.answer(false).expect("it is answered");
            assert!(matches!(answer.status, 400 | 403), "{path:?} was served: {answer:?}");
        }
    }
}

#[test]
fn a_path_has_one_meaning() {
    let check = |path: &str, meant: &str, without_parameters: &str| {
        assert_eq!(resolved(path, true), meant, "{path}");
        assert_eq!(resolved(path, false), without_parameters, "{path}");
    };
    check("/", "/", "/");
    check("/x/../%61dmin?/y", "/admin", "/admin");
    check("/x%2f%2E%2e\\admin//y/.", "/admin/y", "/admin/y");
    check("/%2561", "/%61", "/%61");
    check("/;/admin;x", "/;/admin;x", "/admin");
    check("/x/..;/admin", "/x/..;/admin", "/admin");
    check("/%", "/%", "/%");
}
