//! HTTP/1.1 by our own codec over `httparse`.
//!
//! [`decode`] turns bytes into heads under rules that leave one reading only: [`line`] those of the
//! first line, [`framing`] those of the headers. [`encode`] writes heads; [`body`] reads and writes what
//! follows them.

mod body;
mod chunked;
mod decode;
mod encode;
mod framing;
#[cfg(test)]
mod fuzz;
mod line;

pub(crate) use framing::looks_like_framing;

pub(crate) use body::{BodyCoding, BodyFraming, BodyReader, BodyWriter, Http1Reader, Http1Writer};
pub(crate) use decode::{
    HeadError, ReadRequest, ReadResponse, ResponseLimits, read_request, read_response,
};
pub(crate) use encode::{capitalize_names, write_interim, write_request, write_response};
