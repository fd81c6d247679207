//! The headers of a message: spans of the buffer that they were read into, or a map.
//!
//! HTTP/1.1 headers stay in the buffer that they were read into and are written from there: only removed and added
//! headers cost work. HTTP/2 headers are a map, which is passed on as one when the next hop speaks HTTP/2 too.

use bytes::{BufMut, Bytes, BytesMut};
use http::header::COOKIE;
use http::{HeaderMap, HeaderName, HeaderValue};

use super::name_set::NameSet;

/// The headers of a message.
#[derive(Debug, Clone)]
pub(crate) struct Headers {
    /// A summary of the names. It may still include names that were removed.
    names: NameSet,
    storage: HeaderStorage,
}

/// How the headers of a message are stored.
#[derive(Debug, Clone)]
enum HeaderStorage {
    Spans(BufferedHeaders),
    Map(HeaderMap),
}

impl From<HeaderMap> for Headers {
    fn from(map: HeaderMap) -> Self {
        let names = map.keys().map(|name| name.as_str().as_bytes()).collect();
        Self { names, storage: HeaderStorage::Map(map) }
    }
}

impl From<BufferedHeaders> for Headers {
    fn from(headers: BufferedHeaders) -> Self {
        let names = NameSet::of_head(&headers.buffer, headers.iter().map(|(name, _)| name));
        Self { names, storage: HeaderStorage::Spans(headers) }
    }
}

/// Headers in the buffer that holds their message's head.
#[derive(Debug, Clone)]
pub(crate) struct BufferedHeaders {
    buffer: Bytes,
    spans: Vec<HeaderSpan>,
    added: Vec<(HeaderName, HeaderValue)>,
}

/// Where a header is in the buffer: byte ranges `(start, end)`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HeaderSpan {
    pub(crate) name: (u32, u32),
    pub(crate) value: (u32, u32),
}

impl HeaderSpan {
    /// Adds `by` bytes to every offset.
    pub(crate) fn shift(&mut self, by: usize) {
        let by = u32::try_from(by).unwrap_or(0);
        for (start, end) in [&mut self.name, &mut self.value] {
            // An empty value is `(0, 0)`.
            if start != end {
                *start += by;
                *end += by;
            }
        }
    }
}

impl BufferedHeaders {
    pub(crate) fn new(buffer: Bytes, spans: Vec<HeaderSpan>) -> Self {
        Self { buffer, spans, added: Vec::new() }
    }

    fn slice(&self, (start, end): (u32, u32)) -> &[u8] {
        self.buffer.get(start as usize..end as usize).unwrap_or_default()
    }

    fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        let read = self.spans.iter().map(|span| (self.slice(span.name), self.slice(span.value)));
        read.chain(
            self.added.iter().map(|(name, value)| (name.as_str().as_bytes(), value.as_bytes())),
        )
    }

    /// Copies the headers into a map that shares no memory with the buffer.
    fn to_map(&self) -> HeaderMap {
        let mut map = HeaderMap::with_capacity(self.spans.len() + self.added.len());
        let length = |span: &HeaderSpan| (span.value.1 - span.value.0) as usize;
        let all: usize = self.spans.iter().map(length).sum();
        // The values of a small head share one allocation.
        let mut shared = BytesMut::with_capacity(if all > SHARED_BYTES { 0 } else { all });
        for span in &self.spans {
            let name = HeaderName::from_bytes(self.slice(span.name));
            let value = self.slice(span.value);
            let value = if all > SHARED_BYTES {
                HeaderValue::from_bytes(value)
            } else {
                shared.extend_from_slice(value);
                HeaderValue::from_maybe_shared(shared.split().freeze())
            };
            if let (Ok(name), Ok(value)) = (name, value) {
                map.append(name, value);
            }
        }
        map.extend(self.added.iter().cloned());
        map
    }
}

/// The largest head whose values share one allocation. The HPACK table of an HTTP/2 connection keeps about sixty values
/// (RFC 7541, section 4), and each of them keeps the whole allocation that it shares alive.
const SHARED_BYTES: usize = 1024;

/// Copies a value into an allocation of its own.
fn unshared(value: &HeaderValue) -> HeaderValue {
    let mut copy = HeaderValue::from_bytes(value.as_bytes()).unwrap_or_else(|_| value.clone());
    copy.set_sensitive(value.is_sensitive());
    copy
}

/// The largest map that is searched linearly: parsing and hashing a name costs as much as comparing it with this many
/// others.
const SCAN_LIMIT: usize = 24;

impl Headers {
    /// A summary of the names, for a quick test whether a header can be present.
    pub(crate) fn names(&self) -> NameSet {
        self.names
    }

    /// The first value of a header. `name` must be lower case.
    #[inline]
    pub(crate) fn get(&self, name: &str) -> Option<&[u8]> {
        if self.names.may_have(name) { self.find(name) } else { None }
    }

    fn find(&self, name: &str) -> Option<&[u8]> {
        match &self.storage {
            HeaderStorage::Spans(headers) => headers
                .iter()
                .find(|(n, _)| n.eq_ignore_ascii_case(name.as_bytes()))
                .map(|(_, value)| value),
            HeaderStorage::Map(map) if map.len() <= SCAN_LIMIT => {
                map.iter().find(|(other, _)| other.as_str() == name).map(|(_, v)| v.as_bytes())
            }
            HeaderStorage::Map(map) => map.get(name).map(HeaderValue::as_bytes),
        }
    }

    /// Whether a header of this name is present. `name` must be lower case.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.get(name).is_some()
    }

    /// Calls `visit` with each value of a header. `name` must be lower case.
    pub(crate) fn each(&self, name: &str, mut visit: impl FnMut(&[u8])) {
        if !self.names.may_have(name) {
            return;
        }
        match &self.storage {
            HeaderStorage::Spans(headers) => headers
                .iter()
                .filter(|(n, _)| n.eq_ignore_ascii_case(name.as_bytes()))
                .for_each(|(_, value)| visit(value)),
            HeaderStorage::Map(map) if map.len() <= SCAN_LIMIT => map
                .iter()
                .filter(|(other, _)| other.as_str() == name)
                .for_each(|(_, value)| visit(value.as_bytes())),
            HeaderStorage::Map(map) => {
                map.get_all(name).iter().for_each(|value| visit(value.as_bytes()))
            }
        }
    }

    /// Whether `wanted` is true for any name, in the letter case that it was sent in.
    pub(crate) fn any_name(&self, wanted: impl Fn(&[u8]) -> bool) -> bool {
        match &self.storage {
            HeaderStorage::Spans(headers) => headers.iter().any(|(name, _)| wanted(name)),
            HeaderStorage::Map(map) => map.keys().any(|name| wanted(name.as_str().as_bytes())),
        }
    }

    /// Removes the headers for whose name, in the letter case that it was sent in, `unwanted` is true.
    pub(crate) fn remove(&mut self, unwanted: impl Fn(&[u8]) -> bool) {
        match &mut self.storage {
            HeaderStorage::Spans(BufferedHeaders { buffer, spans, added }) => {
                let name = |span: &HeaderSpan| {
                    buffer.get(span.name.0 as usize..span.name.1 as usize).unwrap_or_default()
                };
                spans.retain(|span| !unwanted(name(span)));
                added.retain(|(name, _)| !unwanted(name.as_str().as_bytes()));
            }
            HeaderStorage::Map(map) => {
                let names: Vec<HeaderName> =
                    map.keys().filter(|name| unwanted(name.as_str().as_bytes())).cloned().collect();
                for name in names {
                    map.remove(name);
                }
            }
        }
    }

    /// Replaces all values of a header with this one.
    pub(crate) fn set(&mut self, name: HeaderName, value: HeaderValue) {
        self.remove(|other| other.eq_ignore_ascii_case(name.as_str().as_bytes()));
        self.add(name, value);
    }

    /// Appends a header.
    pub(crate) fn add(&mut self, name: HeaderName, value: HeaderValue) {
        self.names.insert(name.as_str().as_bytes());
        match &mut self.storage {
            HeaderStorage::Spans(headers) => headers.added.push((name, value)),
            HeaderStorage::Map(map) => {
                map.append(name, value);
            }
        }
    }

    /// Writes the headers as HTTP/1.1 lines.
    pub(crate) fn write(&self, out: &mut BytesMut) {
        let mut line = |name: &[u8], value: &[u8]| {
            out.reserve(name.len() + value.len() + 4);
            out.put_slice(name);
            out.put_slice(b": ");
            out.put_slice(value);
            out.put_slice(b"\r\n");
        };
        match &self.storage {
            HeaderStorage::Spans(headers) => {
                headers.iter().for_each(|(name, value)| line(name, value))
            }
            HeaderStorage::Map(map) => {
                for (name, value) in map.iter().filter(|(name, _)| *name != COOKIE) {
                    line(name.as_str().as_bytes(), value.as_bytes());
                }
                // HTTP/2 may split cookies into several headers; HTTP/1.1 may not (RFC 9113, section 8.2.3).
                let cookies: Vec<&[u8]> =
                    map.get_all(COOKIE).iter().map(HeaderValue::as_bytes).collect();
                if !cookies.is_empty() {
                    line(COOKIE.as_str().as_bytes(), &cookies.join(&b"; "[..]));
                }
            }
        }
    }

    /// Converts the headers into a map, for HTTP/2. Headers that a map cannot hold would be dropped; none exist,
    /// because names and values are checked when they are read.
    pub(crate) fn into_map(self) -> HeaderMap {
        match self.storage {
            HeaderStorage::Map(mut map) => {
                let size = |(name, value): (&HeaderName, &HeaderValue)| {
                    name.as_str().len() + value.as_bytes().len()
                };
                if map.iter().map(size).sum::<usize>() > SHARED_BYTES {
                    map.values_mut().for_each(|value| *value = unshared(value));
                }
                map
            }
            HeaderStorage::Spans(headers) => headers.to_map(),
        }
    }

    /// Copies the headers into a map that shares no memory with the buffer that they were read into: an HPACK table
    /// that keeps one value would keep that whole buffer alive.
    pub(crate) fn to_map(&self) -> HeaderMap {
        match &self.storage {
            HeaderStorage::Map(map) => map.clone(),
            HeaderStorage::Spans(headers) => headers.to_map(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_and_large_maps_give_the_same_values() {
        for others in [0, SCAN_LIMIT - 2, SCAN_LIMIT - 1, SCAN_LIMIT * 2] {
            let mut map = HeaderMap::new();
            map.append("x-tag", HeaderValue::from_static("a"));
            for number in 0..others {
                let name = HeaderName::try_from(format!("x-tag-{number}")).expect("a header name");
                map.append(name, HeaderValue::from_static("other"));
            }
            map.append("x-tag", HeaderValue::from_static("b"));
            let headers = Headers::from(map);
            assert_eq!(headers.get("x-tag"), Some(&b"a"[..]), "{others}");
            assert_eq!(headers.get("x-ta"), None, "{others}");
            let mut values = Vec::new();
            headers.each("x-tag", |value| values.push(value.to_vec()));
            assert_eq!(values, [b"a", b"b"], "{others}");
        }
    }
}
