//! Path policies: a denied path does not reach the service in any spelling, and the service receives the path that was
//! authorized.

use serde_json::{Value, json};
use weft_integration::bootstrap::any;

use crate::client::Client;
use crate::front::Front;

const DENIED: &str = "/admin";
const PATHS: usize = 10_000;

/// Pieces that all parsers read the same way.
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
/// Pieces with another form of the same meaning (RFC 3986, section 6.2.2).
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
/// Pieces that some parsers read in another way.
const AMBIGUOUS: [&str; 32] = [
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

/// A pseudo-random number generator with a fixed seed.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).expect("31 bits fit into usize") % end
    }

    /// A piece of a path. `ambiguity` is 0 for plain pieces only, 1 to add dotted pieces, 2 to add ambiguous ones too.
    fn piece(&mut self, ambiguity: usize) -> &'static str {
        match (ambiguity, self.below(4)) {
            (2, 0) => AMBIGUOUS[self.below(AMBIGUOUS.len())],
            (1 | 2, 1) => DOTTED[self.below(DOTTED.len())],
            _ => PLAIN[self.below(PLAIN.len())],
        }
    }

    fn path(&mut self) -> String {
        let ambiguity = self.below(3);
        let pieces = self.below(8);
        (0..pieces).map(|_| self.piece(ambiguity)).fold("/".to_owned(), |path, piece| path + piece)
    }
}

/// The normal form of a path, computed in another way than by the sidecar: percent-decoded once, backslashes are
/// slashes, and no segment is empty, `.` or `..`. Path parameters (`;x`) are kept if `keeps_parameters`.
fn normalized(target: &str, keeps_parameters: bool) -> String {
    let path = target.split('?').next().unwrap_or_default();
    let decoded = String::from_utf8_lossy(&decoded(path.as_bytes())).replace('\\', "/");
    let mut segments: Vec<&str> = Vec::new();
    for segment in decoded.split('/') {
        let segment =
            if keeps_parameters { segment } else { segment.split(';').next().unwrap_or_default() };
        match segment {
            "" | "." => {}
            ".." => drop(segments.pop()),
            other => segments.push(other),
        }
    }
    format!("/{}", segments.join("/"))
}

fn decoded(path: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut rest = path;
    while let [first, after @ ..] = rest {
        let pair = after.get(..2).and_then(|pair| std::str::from_utf8(pair).ok());
        let escaped =
            pair.filter(|_| *first == b'%').and_then(|pair| u8::from_str_radix(pair, 16).ok());
        out.push(escaped.unwrap_or(*first));
        rest = if escaped.is_some() { &after[2..] } else { after };
    }
    out
}

fn deny() -> Value {
    json!({"name": "rbac", "typed_config": any("envoy.extensions.filters.http.rbac.v3.RBAC", json!({
        "rules": {"action": "DENY", "policies": {"denied": {
            "permissions": [{"url_path": {"path": {"prefix": DENIED}}}],
            "principals": [{"any": true}],
        }}},
    }))})
}

/// The number of requests that were served, denied and refused.
type Counts = [usize; 3];

/// Requests a path where ambiguous paths are refused. Returns an error if the result is wrong.
fn check_strict(client: &mut Client, path: &str, counts: &mut Counts) -> Result<(), String> {
    client.send(format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes());
    let answer = client.answer(false).ok_or("no response")?;
    let expected = normalized(path, true);
    match answer.status {
        200 => {
            counts[0] += 1;
            let target = answer.body.strip_prefix("GET ").and_then(|echo| echo.strip_suffix(" a"));
            let received = normalized(target.ok_or("the service received another request")?, true);
            if received.starts_with(DENIED) || received != expected {
                return Err(format!(
                    "the service received {:?}, which means {received}",
                    answer.body
                ));
            }
        }
        403 => {
            counts[1] += 1;
            if !expected.starts_with(DENIED) {
                return Err(format!("denied, although it means {expected}"));
            }
        }
        400 => counts[2] += 1,
        other => return Err(format!("{other} {}", answer.body)),
    }
    Ok(())
}

/// The segments of a path as a service reads them that decodes the path `times` times and then accepts backslashes as
/// slashes; or, with `splits_first`, that splits the path at slashes before it decodes each segment.
fn segments(path: &str, times: usize, splits_first: bool) -> Vec<String> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if splits_first {
        return path.split('/').map(|s| text(&decoded(s.as_bytes())).replace('/', "%2F")).collect();
    }
    let bytes = (0..times).fold(path.as_bytes().to_vec(), |bytes, _| decoded(&bytes));
    let separators: &[char] = if times == 0 { &['/'] } else { &['/', '\\'] };
    text(&bytes).split(separators).map(str::to_owned).collect()
}

/// The paths that services of many kinds read from a target.
fn service_readings(target: &str) -> Vec<String> {
    let path = target.split('?').next().unwrap_or_default();
    let mut readings = Vec::new();
    for (times, splits_first) in [(0, false), (1, false), (2, false), (1, true)] {
        for shape in 0..8 {
            let [cuts_parameters, merges, resolves_dots] = [1, 2, 4].map(|bit| shape & bit != 0);
            let mut resolved: Vec<String> = Vec::new();
            for segment in segments(path, times, splits_first).iter().skip(1) {
                let bare = segment.split(';').next().unwrap_or_default();
                match if cuts_parameters { bare } else { segment } {
                    "" if merges => {}
                    "." if resolves_dots => {}
                    ".." if resolves_dots => drop(resolved.pop()),
                    other => resolved.push(other.to_owned()),
                }
            }
            readings.push(format!("/{}", resolved.join("/")));
        }
    }
    readings
}

/// The target with the characters of its query encoded that RFC 3986, section 3.4, does not allow there.
fn with_encoded_query(target: &str) -> String {
    match target.split_once('?') {
        Some((path, query)) => format!("{path}?{}", query.replace('\\', "%5C")),
        None => target.to_owned(),
    }
}

/// Requests a path that must reach the service unchanged. Returns an error if the result is wrong.
fn check_as_sent(client: &mut Client, path: &str, counts: &mut Counts) -> Result<(), String> {
    client.send(format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes());
    let answer = client.answer(false).ok_or("no response")?;
    let denied = service_readings(path).into_iter().find(|reading| reading.starts_with(DENIED));
    match (answer.status, denied) {
        (200, None) if answer.body == format!("GET {} a", with_encoded_query(path)) => {
            counts[0] += 1;
        }
        (200, None) => return Err(format!("the service received {:?}", answer.body)),
        (200, Some(reading)) => return Err(format!("served, but some services read {reading}")),
        (403, Some(_)) => counts[1] += 1,
        (403, None) => return Err("denied, but no service reads a denied path".into()),
        (400, _) => counts[2] += 1,
        (other, _) => return Err(format!("{other} {}", answer.body)),
    }
    Ok(())
}

/// Requests a path that the sidecar may normalize. Returns an error if the result is wrong.
fn check_normalized(client: &mut Client, path: &str, counts: &mut Counts) -> Result<(), String> {
    client.send(format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes());
    let answer = client.answer(false).ok_or("no response")?;
    match answer.status {
        200 => {
            let target = answer.body.strip_prefix("GET ").and_then(|echo| echo.strip_suffix(" a"));
            let target = target.ok_or("the service received another request")?;
            let mut readings = service_readings(target).into_iter();
            counts[0] += 1;
            match readings.find(|reading| reading.starts_with(DENIED)) {
                Some(reading) => {
                    Err(format!("{target} was served, but some services read {reading}"))
                }
                None => Ok(()),
            }
        }
        403 => {
            counts[1] += 1;
            let denied = service_readings(path).iter().any(|reading| reading.starts_with(DENIED));
            if denied { Ok(()) } else { Err("denied, but no service reads a denied path".into()) }
        }
        400 => {
            counts[2] += 1;
            Ok(())
        }
        other => Err(format!("{other} {}", answer.body)),
    }
}

/// Requests many random paths where ambiguous paths are refused.
fn run_strict(settings: &Value, at_least: Counts) {
    run(settings, &json!({"path": "strict"}), check_strict, at_least);
}

fn run(
    settings: &Value,
    weft_metadata: &Value,
    check_path: fn(&mut Client, &str, &mut Counts) -> Result<(), String>,
    at_least: Counts,
) {
    let mut front = Front::start(&[deny()], settings, weft_metadata);
    let mut random = Random(4);
    let mut counts = [0; 3];
    let mut client = front.client();
    let mut failures = Vec::new();
    for _ in 0..PATHS {
        let path = random.path();
        let refused = counts[2];
        let failure = check_path(&mut client, &path, &mut counts).err();
        if failure.is_some() || counts[2] > refused {
            client = front.client();
        }
        failures.extend(failure.map(|reason| format!("{path:?}: {reason}")));
    }
    assert!(failures.is_empty(), "{} paths:\n{}", failures.len(), failures.join("\n"));
    let enough = counts.iter().zip(at_least).all(|(count, least)| *count >= least);
    assert!(enough, "served, denied, refused: {counts:?}, expected at least {at_least:?}");
    let violations = front.recorder.take().violations;
    assert!(violations.is_empty(), "{violations:?}");
    front.assert_healthy();
}

#[test]
fn denied_path_is_not_reached_where_ambiguous_paths_are_refused() {
    run_strict(&json!({}), [1000, 200, 1000]);
}

#[test]
fn denied_path_is_not_reached_where_normalization_and_strict_paths_are_combined() {
    run_strict(&json!({"normalize_path": true, "merge_slashes": true}), [1000, 200, 1000]);
    let unescape = "UNESCAPE_AND_FORWARD";
    let settings = json!({"normalize_path": true, "merge_slashes": true,
        "path_with_escaped_slashes_action": unescape});
    run_strict(&settings, [1000, 200, 1000]);
}

#[test]
fn denied_path_is_not_reached_where_paths_are_normalized_as_by_envoy() {
    let settings = json!({"normalize_path": true, "merge_slashes": true});
    run(&settings, &json!({}), check_normalized, [1000, 200, 50]);
}

#[test]
fn denied_path_is_not_reached_where_escaped_slashes_are_decoded_as_by_envoy() {
    let settings = json!({"normalize_path": true, "merge_slashes": true,
        "path_with_escaped_slashes_action": "UNESCAPE_AND_FORWARD"});
    run(&settings, &json!({}), check_normalized, [1000, 200, 50]);
}

#[test]
fn denied_path_is_not_reached_where_paths_are_forwarded_unchanged() {
    run(&json!({}), &json!({"path": "as_sent"}), check_as_sent, [1000, 200, 100]);
}

#[test]
fn denied_path_is_not_reached_with_default_path_settings() {
    run(&json!({}), &json!({}), check_as_sent, [1000, 200, 100]);
}

#[test]
fn common_paths_reach_the_service_unchanged() {
    for weft_metadata in [json!({}), json!({"path": "as_sent"})] {
        assert_common_paths_unchanged(&Front::start(&[deny()], &json!({}), &weft_metadata));
    }
}

fn assert_common_paths_unchanged(front: &Front) {
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
fn escaped_slashes_are_redirected_where_configured() {
    let settings = json!({"path_with_escaped_slashes_action": "UNESCAPE_AND_REDIRECT"});
    let front = Front::start(&[deny()], &settings, &json!({"path": "as_sent"}));
    let mut client = front.client();
    for (path, status) in [("/a%2fb?x=%2F", 307), ("/a%5Cb", 307), ("/a/b?x=%2F", 200)] {
        client.send(format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes());
        assert_eq!(client.answer(false).map(|answer| answer.status), Some(status), "{path}");
    }
}

/// Servlet containers remove path parameters (`;x`) before they interpret a segment, which may then be empty.
#[test]
fn denied_path_is_not_reached_through_path_parameters() {
    for (settings, weft_metadata) in [
        (json!({}), json!({})),
        (json!({}), json!({"path": "strict"})),
        (json!({"normalize_path": true, "merge_slashes": true}), json!({})),
        (json!({"normalize_path": true, "merge_slashes": true}), json!({"path": "strict"})),
    ] {
        let front = Front::start(&[deny()], &settings, &weft_metadata);
        for path in
            ["/;/admin", "/;x/admin", "/;x=y/admin", "/;;/admin/x", "/x/..;/admin", "/.;/admin"]
        {
            assert!(normalized(path, false).starts_with(DENIED), "{path}");
            let mut client = front.client();
            client.send(format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes());
            let answer = client.answer(false).expect("a response arrives");
            assert!(matches!(answer.status, 400 | 403), "{path:?} was served: {answer:?}");
        }
    }
}

#[test]
fn normal_form_of_a_path_is_computed_as_documented() {
    let check = |path: &str, expected: &str, without_parameters: &str| {
        assert_eq!(normalized(path, true), expected, "{path}");
        assert_eq!(normalized(path, false), without_parameters, "{path}");
    };
    check("/", "/", "/");
    check("/x/../%61dmin?/y", "/admin", "/admin");
    check("/x%2f%2E%2e\\admin//y/.", "/admin/y", "/admin/y");
    check("/%2561", "/%61", "/%61");
    check("/;/admin;x", "/;/admin;x", "/admin");
    check("/x/..;/admin", "/x/..;/admin", "/admin");
    check("/%", "/%", "/%");
}
