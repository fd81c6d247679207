//! HTTP/1.1 by our own codec over `httparse`.
//!
//! [`decode`] turns bytes into heads under framing rules that leave one reading only; [`encode`]
//! writes heads; [`body`] reads and writes what follows them.

mod body;
mod chunked;
mod decode;
mod encode;

pub(crate) use body::{BodyReader, BodyWriter, Framing, Reader, Writer};
pub(crate) use decode::{HeadError, ReadRequest, read_request, read_response};
pub(crate) use encode::{write_request, write_response};
