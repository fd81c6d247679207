//! Differential fuzz test: requests that the decoder accepts must be read the same way by `hyper`.
//!
//! `WEFT_FUZZ_SECONDS=60` sets the duration, instead of a fixed number of streams. `WEFT_FUZZ_SEED` is the seed of the
//! first stream; each following stream has the next seed.

mod generator;
mod peer;
mod rig;

use std::time::Duration;

use http::header::{CONTENT_LENGTH, EXPECT, HOST, TRANSFER_ENCODING};
use http::{HeaderName, HeaderValue, Method, Version};
use tokio::time::Instant;
use weft_model::DesyncMode;

use self::generator::RequestStream;
use self::peer::HyperRequest;
use self::rig::{AcceptedRequest, DecoderRig, LIMITS, NEXT_REQUEST, StreamEnd};

/// How many streams are tested when no duration is set.
const STREAMS: u64 = 3000;

/// Checks that a service reads the forwarded bytes as this one request, and nothing more.
async fn check_forwarded(accepted: &AcceptedRequest) -> Result<(), String> {
    if exceeds_limits(accepted) {
        return Err(format!("{accepted:?} is above a limit"));
    }
    if !accepted.is_whole {
        let part =
            accepted.forwarded.strip_suffix(NEXT_REQUEST).expect("the next request was written");
        let (theirs, _) = peer::read(part).await;
        let is_whole = theirs.iter().any(|theirs| theirs.body.is_some());
        return if is_whole {
            Err("hyper reads an incomplete request as complete".to_owned())
        } else {
            Ok(())
        };
    }
    let (theirs, unread) = peer::read(&accepted.forwarded).await;
    let Some((first, behind)) = theirs.split_first() else {
        return if is_refused_by_hyper(&accepted.path) {
            Ok(())
        } else {
            Err("hyper refuses the forwarded request".to_owned())
        };
    };
    same("forwarded", accepted, first)?;
    let headers = (&first.headers, &first.trailers);
    if headers != (&accepted.expected_headers, &accepted.expected_trailers) {
        return Err(format!(
            "{:?} is forwarded, hyper reads {headers:?}",
            accepted.expected_headers
        ));
    }
    let count = |name: HeaderName| first.headers.get_all(name).iter().count();
    if count(HOST) != 1 || count(CONTENT_LENGTH) + count(TRANSFER_ENCODING) > 1 {
        return Err(format!("{:?} has more than one host or framing", first.headers));
    }
    let follows: Vec<String> = behind.iter().map(HyperRequest::path).collect();
    let is_clean = if accepted.is_isolated {
        follows.is_empty() && unread == NEXT_REQUEST
    } else {
        follows == ["/what-follows"] && unread.is_empty()
    };
    if is_clean {
        Ok(())
    } else {
        Err(format!("{follows:?} and \"{}\" are left over", unread.escape_ascii()))
    }
}

fn exceeds_limits(accepted: &AcceptedRequest) -> bool {
    let size = |(name, value): (&HeaderName, &HeaderValue)| name.as_str().len() + value.len();
    let sizes: Vec<usize> = accepted.headers.iter().map(size).collect();
    accepted.path.len() > LIMITS.target_bytes
        || accepted.headers.len() > LIMITS.header_count
        || sizes.iter().any(|size| *size > LIMITS.header_bytes)
        || sizes.iter().sum::<usize>() + accepted.path.len() > LIMITS.head_bytes
}

/// Checks that `hyper` finds the same requests in the original stream. Only the strictest mode guarantees this: the
/// other modes correct the deviations that they accept.
async fn check_raw(
    stream: &RequestStream,
    accepted: &[AcceptedRequest],
    ending: StreamEnd,
) -> Result<(), String> {
    let (theirs, _) = peer::read(&stream.bytes).await;
    for (at, ours) in accepted.iter().enumerate().filter(|(_, accepted)| accepted.is_whole) {
        let Some(theirs) = theirs.get(at) else {
            return if is_refused_by_hyper(&ours.path) {
                Ok(())
            } else {
                Err(format!("hyper finds no request {at}"))
            };
        };
        same("found", ours, theirs)?;
        let mut our_headers = ours.headers.clone();
        let mut their_headers = theirs.headers.clone();
        // The decoder does not keep these among the headers.
        for name in [HOST, CONTENT_LENGTH, EXPECT] {
            our_headers.remove(&name);
            their_headers.remove(&name);
        }
        if our_headers != their_headers || ours.trailers != theirs.trailers {
            return Err(format!("request {at} has {our_headers:?}, hyper finds {their_headers:?}"));
        }
    }
    // `hyper` refuses the tunnel of a CONNECT and reads the bytes after it as requests.
    let opens_tunnel = accepted.last().is_some_and(|last| last.method == Method::CONNECT);
    let are_more = ending != StreamEnd::Refused && !opens_tunnel && theirs.len() > accepted.len();
    if are_more { Err(format!("hyper finds {} requests", theirs.len())) } else { Ok(()) }
}

/// Checks that both read the same request. `verb` is for the error message.
fn same(verb: &str, ours: &AcceptedRequest, theirs: &HyperRequest) -> Result<(), String> {
    let path = theirs.path();
    let authority = match theirs.authority() {
        _ if has_no_authority(&ours.authority, theirs) => ours.authority.as_bytes(),
        authority => authority,
    };
    let text = |bytes: &[u8]| bytes.escape_ascii().to_string();
    let one =
        (&ours.method, ours.path.as_str(), text(ours.authority.as_bytes()), Some(text(&ours.body)));
    let other = (&theirs.method, path.as_str(), text(authority), theirs.body.as_deref().map(text));
    if one == other { Ok(()) } else { Err(format!("{one:?} is {verb}, hyper reads {other:?}")) }
}

/// Whether `hyper` is known to refuse such a target. RFC 3986 forbids these characters in a path; clients send them,
/// and no parser treats one as the end of the path.
fn is_refused_by_hyper(path: &str) -> bool {
    path.contains(['<', '>', '`', '"'])
}

/// Whether an HTTP/1.0 request has no authority, so that weft forwards it with an empty `host` (RFC 9112, section 3.3).
fn has_no_authority(authority: &str, theirs: &HyperRequest) -> bool {
    authority.is_empty() && theirs.version == Version::HTTP_10 && theirs.authority().is_empty()
}

/// The results of the streams in the strictest mode.
#[derive(Debug, Default)]
struct FuzzStatistics {
    streams: u64,
    /// Streams that were accepted completely.
    accepted: u64,
    /// Streams of which a part was refused.
    refused: u64,
    /// Requests that were accepted.
    requests: usize,
    /// Accepted requests with the chunked coding.
    chunked: usize,
}

impl FuzzStatistics {
    fn add(&mut self, accepted: &[AcceptedRequest], ending: StreamEnd) {
        let is_chunked =
            |accepted: &&AcceptedRequest| accepted.expected_headers.contains_key(TRANSFER_ENCODING);
        self.streams += 1;
        self.accepted += u64::from(ending != StreamEnd::Refused);
        self.refused += u64::from(ending == StreamEnd::Refused);
        self.requests += accepted.len();
        self.chunked += accepted.iter().filter(is_chunked).count();
    }
}

/// Checks a stream in every mode.
async fn check(
    rig: &mut DecoderRig,
    stream: &RequestStream,
    count: &mut FuzzStatistics,
) -> Result<(), String> {
    let parts: Vec<&[u8]> = stream.parts().collect();
    let (strict, strict_end) = rig.read(&parts, DesyncMode::Strictest).await;
    let (defensive, _) = rig.read(&parts, DesyncMode::Defensive).await;
    let (monitor, monitor_end) = rig.read(&parts, DesyncMode::Monitor).await;
    let (whole, whole_end) = rig.read(&[&stream.bytes], DesyncMode::Monitor).await;
    for accepted in strict.iter().chain(&defensive).chain(&monitor) {
        check_forwarded(accepted).await?;
    }
    check_raw(stream, &strict, strict_end).await?;
    if !begins_with(&whole, &monitor) || !begins_with(&monitor, &whole) || whole_end != monitor_end
    {
        return Err("the result depends on how the stream is split into writes".to_owned());
    }
    if !begins_with(&defensive, &strict) || !begins_with(&monitor, &defensive) {
        return Err("a stricter mode reads other or more requests".to_owned());
    }
    count.add(&strict, strict_end);
    Ok(())
}

/// Whether `many` begins with `few`.
fn begins_with(many: &[AcceptedRequest], few: &[AcceptedRequest]) -> bool {
    many.len() >= few.len() && many.iter().zip(few).all(|(one, other)| one.is_the_same_as(other))
}

/// Minimizes a failing stream by removing parts of it.
async fn minimized(
    rig: &mut DecoderRig,
    mut stream: RequestStream,
    mut why: String,
) -> (RequestStream, String) {
    for count in [256, 64, 16, 4, 1, 4, 1] {
        let mut at = 0;
        while at < stream.bytes.len() {
            let less = stream.without(at, count);
            match check(rig, &less, &mut FuzzStatistics::default()).await {
                Err(still) => (stream, why) = (less, still),
                Ok(()) => at += count,
            }
        }
    }
    (stream, why)
}

/// Prints the stream when a check panics.
struct PrintOnPanic<'a>(u64, &'a RequestStream);

impl Drop for PrintOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            print(&format!("WEFT_FUZZ_SEED={} is \"{}\"", self.0, self.1.bytes.escape_ascii()));
        }
    }
}

#[expect(clippy::print_stderr, reason = "repeating a run needs its seed")]
fn print(text: &str) {
    eprintln!("{text}");
}

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().expect("a number"))
}

#[tokio::test]
async fn accepted_requests_are_read_the_same_way_by_hyper() {
    let seconds = number("WEFT_FUZZ_SECONDS");
    let until = seconds.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let any = || until.map_or(0, |_| fastrand::u64(..));
    let first = number("WEFT_FUZZ_SEED").unwrap_or_else(any);
    print(&format!("first stream: WEFT_FUZZ_SEED={first}"));
    let mut rig = DecoderRig::new().await;
    let mut count = FuzzStatistics::default();
    while until.map_or(count.streams < STREAMS, |until| Instant::now() < until) {
        let seed = first.wrapping_add(count.streams);
        let stream = RequestStream::of_seed(seed);
        let _print = PrintOnPanic(seed, &stream);
        if let Err(error) = check(&mut rig, &stream, &mut count).await {
            let (small, error) = minimized(&mut rig, stream.clone(), error).await;
            panic!("{error}\n minimized: \"{}\"", small.bytes.escape_ascii());
        }
    }
    print(&format!("{count:?}"));
    let FuzzStatistics { streams, accepted, refused, requests, chunked } = count;
    assert!(
        accepted * 5 > streams && refused * 5 > streams,
        "too few streams are accepted or refused"
    );
    assert!(requests as u64 * 2 > streams, "too few requests are accepted");
    assert!(chunked * 10 > requests, "too few requests are chunked");
}

#[tokio::test]
async fn ambiguous_chunks_and_trailers_are_refused() {
    let mut rig = DecoderRig::new().await;
    for body in [
        "1\x0c\r\nx\r\n0\r\n\r\n",
        "0\x0c\r\n\r\n",
        "0\x0c;a\r\n\r\n",
        "0\r\na: b\nc: d\r\n\r\n",
        "0\r\na: b\n\nGET / HTTP/1.1\r\nHost: b\r\n\r\n",
        "0\r\n\nGET / HTTP/1.1\r\nHost: b\r\n\r\n",
    ] {
        let stream =
            format!("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n{body}");
        for mode in [DesyncMode::Strictest, DesyncMode::Defensive] {
            let (accepted, ending) = rig.read(&[stream.as_bytes()], mode).await;
            let is_whole = accepted.iter().any(|accepted| accepted.is_whole);
            assert_eq!((is_whole, ending), (false, StreamEnd::Refused), "{body:?}");
        }
    }
}
