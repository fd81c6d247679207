//! Actions of an HTTP/2 client end neither its own other streams nor the streams of other clients, whose requests share
//! a connection between two sidecars.

use std::time::Duration;

use http::Method;
use weft_integration::bootstrap::allow_only;
use weft_integration::curl::Curl;
use weft_integration::http2_client::{Http2Client, next, send, whole};
use weft_integration::http2_frames::flag::{END_HEADERS, END_STREAM, NONE};
use weft_integration::http2_frames::kind::{DATA, HEADERS, RST_STREAM};
use weft_integration::http2_frames::{self, headers};
use weft_integration::http2_probe::{POST, data};
use weft_integration::recording_server::RecordingServer;
use weft_integration::sidecar_pair::{PairConfig, SidecarPair};

const WINDOW_BYTES: u32 = 1 << 20;
const DOWNLOAD_BYTES: usize = 16 << 20;
const DOWNLOADS: usize = 4;

/// Two sidecars with an HTTP/1.1 service, whose clients may get `/bytes` only.
fn start() -> SidecarPair {
    let service = RecordingServer::start();
    let filters = vec![allow_only("client", "/bytes")];
    SidecarPair::start(&PairConfig {
        filters,
        timeout_seconds: 0,
        ..PairConfig::http1(service.port)
    })
}

/// A repetition count: the value of an environment variable, or else `usual`.
fn count_from(variable: &str, usual: usize) -> usize {
    std::env::var(variable).ok().and_then(|count_from| count_from.parse().ok()).unwrap_or(usual)
}

/// Downloads slowly until `done`.
///
/// # Errors
///
/// The download failed or ended early.
async fn download(
    client: Http2Client,
    mut done: tokio::sync::watch::Receiver<bool>,
) -> Result<usize, String> {
    let path = format!("/bytes/{DOWNLOAD_BYTES}");
    let (response, _) = client.begin(Method::GET, &path, true).await?;
    let response = response.await.map_err(|error| error.to_string())?;
    let mut body = response.into_body();
    let mut bytes = 0;
    while let Some(piece) = next(&mut body).await {
        bytes += piece.map_err(|error| format!("{bytes} bytes: {error}"))?;
        if !*done.borrow() {
            // One piece per 50 ms while the other work runs.
            drop(tokio::time::timeout(Duration::from_millis(50), done.changed()).await);
        }
    }
    Ok(bytes)
}

/// Runs `work` on a connection while downloads run on that connection and on others. Asserts that each download is
/// complete.
async fn during_downloads<T>(port: u16, work: impl AsyncFnOnce(Http2Client) -> T) -> T {
    let client = Http2Client::connect(port, WINDOW_BYTES).await;
    let (stop, done) = tokio::sync::watch::channel(false);
    let mut downloads = vec![tokio::spawn(download(client.clone(), done.clone()))];
    for _ in 0..DOWNLOADS {
        let other = Http2Client::connect(port, 64 * 1024).await;
        downloads.push(tokio::spawn(download(other, done.clone())));
    }
    let result = work(client).await;
    stop.send(true).expect("the downloads wait for the end");
    for download in downloads {
        let downloaded = download.await.expect("the download does not panic");
        assert_eq!(downloaded, Ok(DOWNLOAD_BYTES));
    }
    result
}

/// Uploads to a path that the policy denies, `at_once` at a time. Asserts that each gets 403.
async fn refuse_uploads(port: u16, uploads: usize, bytes: usize, at_once: usize) {
    during_downloads(port, async |client| {
        for _ in 0..uploads / at_once {
            let posts = (0..at_once).map(|_| {
                let client = client.clone();
                tokio::spawn(async move { client.post("/denied", bytes).await })
            });
            for post in posts.collect::<Vec<_>>() {
                let answer = post.await.expect("the upload does not panic");
                assert!(matches!(answer, Ok((403, _))), "{answer:?}");
            }
        }
    })
    .await;
}

/// A full run has `WEFT_REFUSED_UPLOADS=100000`.
#[tokio::test]
async fn refused_uploads_do_not_break_downloads_of_any_client() {
    let mut pair = start();
    let uploads = count_from("WEFT_REFUSED_UPLOADS", 1_000);
    refuse_uploads(pair.caller.port, uploads, 40_000, 50).await;
    // Larger than all flow-control windows.
    refuse_uploads(pair.caller.port, 8, 6_000_000, 4).await;
    assert_eq!(pair.caller.metric("weft_sidecar_http2_flood_disconnects_total"), 0);
    assert_eq!(pair.callee.metric("weft_sidecar_http2_flood_disconnects_total"), 0);
    pair.assert_healthy();
}

#[tokio::test]
async fn cancelled_downloads_do_not_break_downloads_of_other_clients() {
    // In bytes, less than the window of the client's connection.
    const AT_ONCE: usize = 50;
    let mut pair = start();
    let rounds = count_from("WEFT_CANCELLED_DOWNLOADS", 1_200) / AT_ONCE;
    during_downloads(pair.caller.port, async |client| {
        for _ in 0..rounds {
            let mut begun = Vec::new();
            for _ in 0..AT_ONCE {
                begun.push(
                    client
                        .begin(Method::GET, "/bytes/100000", true)
                        .await
                        .expect("the connection is open")
                        .0,
                );
            }
            // The first requests have responses in flight, the last have not been sent yet.
            let first = begun.swap_remove(0);
            whole(first).await.expect("the first request gets a response");
            drop(begun);
        }
    })
    .await;
    let connections = pair.caller.metric("weft_sidecar_upstream_connections_total");
    assert!(connections <= 16, "{connections} upstream connections");
    pair.assert_healthy();
}

#[test]
fn early_response_is_complete_before_its_stream_is_reset() {
    let pair = start();
    let mut client = http2_frames::Http2FrameClient::connect(pair.caller.port);
    client.send(&headers(END_HEADERS, 1, &[&POST[..3], &[(":path", "/denied")]].concat()));
    client.send(&data(NONE, 1, b"x"));
    let answer = client.find("answer", |frame| frame.stream == 1);
    assert_eq!(answer.kind, HEADERS, "{answer:?}");
    if !answer.ends_stream() {
        let end = client.find("end", |frame| frame.stream == 1 && frame.ends_stream());
        assert_eq!(end.kind, DATA);
    }
    // The client may continue its upload although it has the response.
    client.send(&data(END_STREAM, 1, b"x"));
    client.send(&headers(END_HEADERS | END_STREAM, 3, &http2_frames::get("/bytes/1")));
    let next = client.find("next", |frame| matches!(frame.kind, RST_STREAM | DATA));
    assert_eq!((next.kind, next.stream), (DATA, 3), "{next:?}: stream 1 must not be reset");
}

#[test]
fn early_response_reaches_curl_within_its_upload() {
    let pair = start();
    let folder = tempfile::TempDir::new().expect("a temporary folder can be created");
    let file = folder.path().join("body");
    std::fs::write(&file, vec![b'x'; 5_000_000]).expect("the folder is writable");
    let file = format!("@{}", file.display());
    let upload = ["--http2-prior-knowledge", "--header", "expect:", "--data-binary", &file];
    for _ in 0..10 {
        let answer = Curl::get(pair.caller.port, "/denied").with(&upload).run();
        assert_eq!((answer.exit, answer.status), (0, 403), "{answer:?}");
    }
}

#[tokio::test]
async fn endless_upload_is_reset_with_no_error_after_its_response() {
    const MORE_THAN_IS_DISCARDED_BYTES: usize = 66 << 20;
    let pair = start();
    let client = Http2Client::connect(pair.caller.port, WINDOW_BYTES).await;
    let posting = client.begin(Method::POST, "/denied", false).await;
    let (response, mut stream) = posting.expect("the stream is open");
    let answer = whole(response).await;
    assert!(matches!(answer, Ok((403, 1..))), "{answer:?}");
    send(&mut stream, MORE_THAN_IS_DISCARDED_BYTES).await;
    let reset = std::future::poll_fn(|cx| stream.poll_reset(cx)).await;
    assert_eq!(reset.expect("the stream is reset"), h2::Reason::NO_ERROR);
}
