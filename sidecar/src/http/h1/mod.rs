//! The HTTP/1.1 codec, which uses `httparse` for header syntax.
//!
//! [`decode`] parses message heads and refuses ambiguous ones: [`line`] parses the request line, [`framing`] the
//! headers that frame the message. [`encode`] writes heads. [`body`] reads and writes bodies, [`chunked`] decodes
//! chunks.

mod body;
mod chunked;
mod decode;
mod encode;
mod framing;
#[cfg(test)]
mod fuzz;
mod line;

pub(crate) use body::{BodyCoding, BodyReader, BodyWriter, Http1Reader, Http1Writer};
pub(crate) use decode::{
    HeadError, ReadRequest, ReadResponse, ResponseLimits, read_request, read_response,
};
pub(crate) use encode::{capitalize_names, write_interim, write_request, write_response};
pub(crate) use framing::{BodyFraming, looks_like_framing};
