//! What we accept, others read the same way: the decoder against `hyper`, on streams of requests
//! that come from a seed.
//!
//! `WEFT_FUZZ_SECONDS=60` runs that long instead of a fixed number of streams; `WEFT_FUZZ_SEED` is the
//! seed of the first stream, and each that follows has the next.

mod generator;
mod peer;
mod rig;

use std::time::Duration;

use http::header::{CONTENT_LENGTH, EXPECT, HOST, TRANSFER_ENCODING};
use http::{HeaderName, HeaderValue, Method, Version};
use tokio::time::Instant;
use weft_model::DesyncMode;

use self::generator::Stream;
use self::peer::Theirs;
use self::rig::{Ending, LIMITS, NEXT, Passed, Rig};

/// How many streams are tried when no time is given.
const STREAMS: u64 = 3000;

/// That a service reads what was forwarded as this one request, with nothing left behind it.
async fn check_forwarded(passed: &Passed) -> Result<(), String> {
    if exceeds_limits(passed) {
        return Err(format!("{passed:?} is above a limit"));
    }
    if !passed.is_whole {
        let part = passed.forwarded.strip_suffix(NEXT).expect("it was written");
        let (theirs, _) = peer::read(part).await;
        let is_whole = theirs.iter().any(|theirs| theirs.body.is_some());
        return if is_whole { Err("what broke off is whole to others".to_owned()) } else { Ok(()) };
    }
    let (theirs, left) = peer::read(&passed.forwarded).await;
    let Some((first, behind)) = theirs.split_first() else {
        return if is_refused_by_others(&passed.path) {
            Ok(())
        } else {
            Err("what is forwarded is refused by others".to_owned())
        };
    };
    same("forwarded", passed, first)?;
    let headers = (&first.headers, &first.trailers);
    if headers != (&passed.sent, &passed.sent_trailers) {
        return Err(format!("{:?} is forwarded, others read {headers:?}", passed.sent));
    }
    let count = |name: HeaderName| first.headers.get_all(name).iter().count();
    if count(HOST) != 1 || count(CONTENT_LENGTH) + count(TRANSFER_ENCODING) > 1 {
        return Err(format!("{:?} has more than one host or framing", first.headers));
    }
    let follows: Vec<String> = behind.iter().map(Theirs::path).collect();
    let is_clean = if passed.is_isolated {
        follows.is_empty() && left == NEXT
    } else {
        follows == ["/what-follows"] && left.is_empty()
    };
    if is_clean {
        Ok(())
    } else {
        Err(format!("{follows:?} and \"{}\" are left behind", left.escape_ascii()))
    }
}

fn exceeds_limits(passed: &Passed) -> bool {
    let size = |(name, value): (&HeaderName, &HeaderValue)| name.as_str().len() + value.len();
    let sizes: Vec<usize> = passed.headers.iter().map(size).collect();
    passed.path.len() > LIMITS.target_bytes
        || passed.headers.len() > LIMITS.field_count
        || sizes.iter().any(|size| *size > LIMITS.field_bytes)
        || sizes.iter().sum::<usize>() + passed.path.len() > LIMITS.head_bytes
}

/// That others find in the stream itself the requests that were found in it.
/// Only the strictest mode promises it: the others put right what they let through.
async fn check_raw(stream: &Stream, passed: &[Passed], ending: Ending) -> Result<(), String> {
    let (theirs, _) = peer::read(&stream.bytes).await;
    for (at, ours) in passed.iter().enumerate().filter(|(_, passed)| passed.is_whole) {
        let Some(theirs) = theirs.get(at) else {
            return if is_refused_by_others(&ours.path) {
                Ok(())
            } else {
                Err(format!("others find no request {at}"))
            };
        };
        same("found", ours, theirs)?;
        let (mut our_fields, mut their_fields) = (ours.headers.clone(), theirs.headers.clone());
        // Kept apart from the headers when they are read.
        for name in [HOST, CONTENT_LENGTH, EXPECT] {
            our_fields.remove(&name);
            their_fields.remove(&name);
        }
        if our_fields != their_fields || ours.trailers != theirs.trailers {
            return Err(format!("request {at} has {our_fields:?}, others find {their_fields:?}"));
        }
    }
    // What follows a request for a tunnel is a request only for the peer, which refuses the tunnel.
    let opens_tunnel = passed.last().is_some_and(|last| last.method == Method::CONNECT);
    let are_more = ending != Ending::Refused && !opens_tunnel && theirs.len() > passed.len();
    if are_more { Err(format!("others find {} requests", theirs.len())) } else { Ok(()) }
}

/// That both read the same request.
fn same(verb: &str, ours: &Passed, theirs: &Theirs) -> Result<(), String> {
    let path = theirs.path();
    let authority = match theirs.authority() {
        _ if is_named_by_us(&ours.authority, theirs) => ours.authority.as_bytes(),
        authority => authority,
    };
    let text = |bytes: &[u8]| bytes.escape_ascii().to_string();
    let one =
        (&ours.method, ours.path.as_str(), text(ours.authority.as_bytes()), Some(text(&ours.body)));
    let other = (&theirs.method, path.as_str(), text(authority), theirs.body.as_deref().map(text));
    if one == other { Ok(()) } else { Err(format!("{one:?} is {verb}, others read {other:?}")) }
}

/// Whether `hyper` is known to refuse such a target. It holds the path to fewer characters than we do:
/// RFC 3986 has no place for these, clients send them all the same, and nobody takes them for the end
/// of anything.
fn is_refused_by_others(path: &str) -> bool {
    path.contains(['<', '>', '`', '"'])
}

/// Whether `hyper` is known to find no authority where we name one: HTTP/1.0 needs no `host`, and then we
/// say which is meant (RFC 9112, section 3.3).
fn is_named_by_us(authority: &str, theirs: &Theirs) -> bool {
    authority.is_empty() && theirs.version == Version::HTTP_10 && theirs.authority().is_empty()
}

/// What came of the streams in the strictest mode.
#[derive(Debug, Default)]
struct Count {
    streams: u64,
    /// Those of which all was accepted.
    accepted: u64,
    /// Those of which something was refused.
    refused: u64,
    /// Requests that were accepted, and how many of them came in chunks.
    requests: usize,
    chunked: usize,
}

impl Count {
    fn add(&mut self, passed: &[Passed], ending: Ending) {
        let is_chunked = |passed: &&Passed| passed.sent.contains_key(TRANSFER_ENCODING);
        self.streams += 1;
        self.accepted += u64::from(ending != Ending::Refused);
        self.refused += u64::from(ending == Ending::Refused);
        self.requests += passed.len();
        self.chunked += passed.iter().filter(is_chunked).count();
    }
}

/// Holds all that must hold of a stream.
async fn check(rig: &mut Rig, stream: &Stream, count: &mut Count) -> Result<(), String> {
    let parts: Vec<&[u8]> = stream.parts().collect();
    let (strict, strict_end) = rig.read(&parts, DesyncMode::Strictest).await;
    let (defensive, _) = rig.read(&parts, DesyncMode::Defensive).await;
    let (monitor, monitor_end) = rig.read(&parts, DesyncMode::Monitor).await;
    let (whole, whole_end) = rig.read(&[&stream.bytes], DesyncMode::Monitor).await;
    for passed in strict.iter().chain(&defensive).chain(&monitor) {
        check_forwarded(passed).await?;
    }
    check_raw(stream, &strict, strict_end).await?;
    if !begins_with(&whole, &monitor) || !begins_with(&monitor, &whole) || whole_end != monitor_end
    {
        return Err("it depends on how the stream is cut".to_owned());
    }
    if !begins_with(&defensive, &strict) || !begins_with(&monitor, &defensive) {
        return Err("a stricter mode reads otherwise, or more".to_owned());
    }
    count.add(&strict, strict_end);
    Ok(())
}

/// Whether the first of `many` are those `few`.
fn begins_with(many: &[Passed], few: &[Passed]) -> bool {
    many.len() >= few.len() && many.iter().zip(few).all(|(one, other)| one.is_the_same_as(other))
}

/// The least that is left of a failing stream when parts of it are taken away.
async fn smallest(rig: &mut Rig, mut stream: Stream, mut why: String) -> (Stream, String) {
    for count in [256, 64, 16, 4, 1, 4, 1] {
        let mut at = 0;
        while at < stream.bytes.len() {
            let less = stream.without(at, count);
            match check(rig, &less, &mut Count::default()).await {
                Err(still) => (stream, why) = (less, still),
                Ok(()) => at += count,
            }
        }
    }
    (stream, why)
}

/// Says which stream it was when something panics.
struct Telling<'a>(u64, &'a Stream);

impl Drop for Telling<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            tell(&format!("WEFT_FUZZ_SEED={} is \"{}\"", self.0, self.1.bytes.escape_ascii()));
        }
    }
}

#[expect(clippy::print_stderr, reason = "who repeats a run must be told its seed")]
fn tell(text: &str) {
    eprintln!("{text}");
}

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().expect("a number"))
}

#[tokio::test]
async fn what_is_accepted_is_read_the_same_by_others() {
    let seconds = number("WEFT_FUZZ_SECONDS");
    let until = seconds.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let any = || until.map_or(0, |_| fastrand::u64(..));
    let first = number("WEFT_FUZZ_SEED").unwrap_or_else(any);
    tell(&format!("the first stream has WEFT_FUZZ_SEED={first}"));
    let mut rig = Rig::new().await;
    let mut count = Count::default();
    while until.map_or(count.streams < STREAMS, |until| Instant::now() < until) {
        let seed = first.wrapping_add(count.streams);
        let stream = Stream::of_seed(seed);
        let _telling = Telling(seed, &stream);
        if let Err(why) = check(&mut rig, &stream, &mut count).await {
            let (small, why) = smallest(&mut rig, stream.clone(), why).await;
            panic!("{why}\n at the smallest: \"{}\"", small.bytes.escape_ascii());
        }
    }
    tell(&format!("{count:?}"));
    let Count { streams, accepted, refused, requests, chunked } = count;
    assert!(accepted * 5 > streams && refused * 5 > streams, "one of the two is hardly tried");
    assert!(requests as u64 * 2 > streams, "few requests are accepted");
    assert!(chunked * 10 > requests, "few requests have chunks");
}

#[tokio::test]
async fn chunks_and_trailers_have_one_reading() {
    let mut rig = Rig::new().await;
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
            let (passed, ending) = rig.read(&[stream.as_bytes()], mode).await;
            let is_whole = passed.iter().any(|passed| passed.is_whole);
            assert_eq!((is_whole, ending), (false, Ending::Refused), "{body:?}");
        }
    }
}
