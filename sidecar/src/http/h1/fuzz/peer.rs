//! Reads a stream of requests with `hyper`, as a reference.

use std::cell::RefCell;
use std::convert::Infallible;

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode, Uri, Version};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;

/// A request as `hyper` read it.
#[derive(Debug)]
pub(super) struct HyperRequest {
    pub(super) method: Method,
    pub(super) version: Version,
    uri: Uri,
    pub(super) headers: HeaderMap,
    /// None when the body was incomplete.
    pub(super) body: Option<Bytes>,
    pub(super) trailers: HeaderMap,
}

impl HyperRequest {
    async fn of(request: Request<Incoming>) -> Self {
        let (head, body) = request.into_parts();
        let body = body.collect().await.ok();
        let trailers = body.as_ref().and_then(|body| body.trailers().cloned());
        Self {
            method: head.method,
            version: head.version,
            uri: head.uri,
            headers: head.headers,
            body: body.map(http_body_util::Collected::to_bytes),
            trailers: trailers.unwrap_or_default(),
        }
    }

    /// Path and query; empty for CONNECT.
    pub(super) fn path(&self) -> String {
        let path = self.uri.path_and_query().filter(|_| self.method != Method::CONNECT);
        path.map(ToString::to_string).unwrap_or_default()
    }

    /// The authority of the target, or of `host` without it.
    pub(super) fn authority(&self) -> &[u8] {
        let host = || self.headers.get(http::header::HOST).map(http::HeaderValue::as_bytes);
        let from_target = self.uri.authority().map(|authority| authority.as_str().as_bytes());
        from_target.or_else(host).unwrap_or_default()
    }
}

/// All requests that `hyper` reads from `bytes`, and the bytes that it left unread.
pub(super) async fn read(bytes: &[u8]) -> (Vec<HyperRequest>, Vec<u8>) {
    let read = RefCell::new(Vec::new());
    let service = service_fn(|request: Request<Incoming>| async {
        let request_read = HyperRequest::of(request).await;
        // Otherwise `hyper` would treat the next request as tunnel data.
        let is_tunnel = request_read.method == Method::CONNECT;
        let status = if is_tunnel { StatusCode::METHOD_NOT_ALLOWED } else { StatusCode::OK };
        read.borrow_mut().push(request_read);
        let mut response = Response::new(Empty::<Bytes>::new());
        *response.status_mut() = status;
        Ok::<_, Infallible>(response)
    });
    let io = TokioIo::new(tokio::io::join(bytes, tokio::io::sink()));
    let mut serving = http1::Builder::new();
    serving.half_close(true);
    let ended = serving.serve_connection(io, service).without_shutdown().await;
    let leftover = ended.map(|parts| {
        let unread = parts.io.into_inner().into_inner().0;
        [&parts.read_buf[..], unread].concat()
    });
    (read.take(), leftover.unwrap_or_default())
}
