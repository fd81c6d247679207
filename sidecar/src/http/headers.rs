//! The header headers of a message: spans of the buffer they were read into, or a map.
//!
//! HTTP/1.1 headers stay where they were read and are written again from there; only what is
//! removed or added costs anything. HTTP/2 brings a map, which stays one when the next hop is
//! HTTP/2 too.

use bytes::{BufMut, Bytes, BytesMut};
use http::header::COOKIE;
use http::{HeaderMap, HeaderName, HeaderValue};

use super::name_set::NameSet;

/// The headers of a message.
#[derive(Debug, Clone)]
pub(crate) struct Headers {
    /// Every name that is there, and maybe some that were.
    names: NameSet,
    held: Held,
}

/// How the headers of a message are held.
#[derive(Debug, Clone)]
enum Held {
    Spans(BufferedHeaders),
    Map(HeaderMap),
}

impl From<HeaderMap> for Headers {
    fn from(map: HeaderMap) -> Self {
        let names = map.keys().map(|name| name.as_str().as_bytes()).collect();
        Self { names, held: Held::Map(map) }
    }
}

impl From<BufferedHeaders> for Headers {
    fn from(headers: BufferedHeaders) -> Self {
        let names = NameSet::of_head(&headers.buffer, headers.iter().map(|(name, _)| name));
        Self { names, held: Held::Spans(headers) }
    }
}

/// Headers in the buffer that holds their message's head.
#[derive(Debug, Clone)]
pub(crate) struct BufferedHeaders {
    buffer: Bytes,
    spans: Vec<HeaderSpan>,
    added: Vec<(HeaderName, HeaderValue)>,
}

/// Where a field stands in the buffer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HeaderSpan {
    pub(crate) name: (u32, u32),
    pub(crate) value: (u32, u32),
}

impl HeaderSpan {
    /// Moves it by so many bytes.
    pub(crate) fn shift(&mut self, by: usize) {
        let by = u32::try_from(by).unwrap_or(0);
        for (start, end) in [&mut self.name, &mut self.value] {
            // An empty value has no place.
            if start != end {
                (*start, *end) = (*start + by, *end + by);
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

    /// A map that shares no room with the buffer.
    fn to_map(&self) -> HeaderMap {
        let mut map = HeaderMap::with_capacity(self.spans.len() + self.added.len());
        let length = |span: &HeaderSpan| (span.value.1 - span.value.0) as usize;
        let all: usize = self.spans.iter().map(length).sum();
        // One room for all of them, where it is small.
        let mut room = BytesMut::with_capacity(if all > SHARED_BYTES { 0 } else { all });
        for span in &self.spans {
            let name = HeaderName::from_bytes(self.slice(span.name));
            let value = self.slice(span.value);
            let value = if all > SHARED_BYTES {
                HeaderValue::from_bytes(value)
            } else {
                room.extend_from_slice(value);
                HeaderValue::from_maybe_shared(room.split().freeze())
            };
            if let (Ok(name), Ok(value)) = (name, value) {
                map.append(name, value);
            }
        }
        map.extend(self.added.iter().cloned());
        map
    }
}

/// How large a head may be whose values share its room. A connection of HTTP/2 remembers some sixty of the
/// values that it sent (RFC 7541, section 4), and each keeps all that it shares room with.
const SHARED_BYTES: usize = 1024;

/// The same value with room of its own.
fn apart(value: &HeaderValue) -> HeaderValue {
    let mut own = HeaderValue::from_bytes(value.as_bytes()).unwrap_or_else(|_| value.clone());
    own.set_sensitive(value.is_sensitive());
    own
}

/// The largest map that is read through rather than looked up: parsing and hashing a name costs as much as
/// comparing it with this many others.
const SCAN_LIMIT: usize = 24;

impl Headers {
    /// The names that may be there.
    pub(crate) fn names(&self) -> NameSet {
        self.names
    }

    /// The first value of a field. `name` is lower case.
    #[inline]
    pub(crate) fn get(&self, name: &str) -> Option<&[u8]> {
        if self.names.may_have(name) { self.find(name) } else { None }
    }

    fn find(&self, name: &str) -> Option<&[u8]> {
        match &self.held {
            Held::Spans(headers) => headers
                .iter()
                .find(|(n, _)| n.eq_ignore_ascii_case(name.as_bytes()))
                .map(|(_, value)| value),
            Held::Map(map) if map.len() <= SCAN_LIMIT => {
                map.iter().find(|(held, _)| held.as_str() == name).map(|(_, v)| v.as_bytes())
            }
            Held::Map(map) => map.get(name).map(HeaderValue::as_bytes),
        }
    }

    /// Whether there is a field of this name. `name` is lower case.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.get(name).is_some()
    }

    /// Calls `see` with each value of a field. `name` is lower case.
    pub(crate) fn each(&self, name: &str, mut see: impl FnMut(&[u8])) {
        if !self.names.may_have(name) {
            return;
        }
        match &self.held {
            Held::Spans(headers) => headers
                .iter()
                .filter(|(n, _)| n.eq_ignore_ascii_case(name.as_bytes()))
                .for_each(|(_, value)| see(value)),
            Held::Map(map) if map.len() <= SCAN_LIMIT => map
                .iter()
                .filter(|(held, _)| held.as_str() == name)
                .for_each(|(_, value)| see(value.as_bytes())),
            Held::Map(map) => map.get_all(name).iter().for_each(|value| see(value.as_bytes())),
        }
    }

    /// Whether any name, in the case it was written, is one that `wanted` picks.
    pub(crate) fn any_name(&self, wanted: impl Fn(&[u8]) -> bool) -> bool {
        match &self.held {
            Held::Spans(headers) => headers.iter().any(|(name, _)| wanted(name)),
            Held::Map(map) => map.keys().any(|name| wanted(name.as_str().as_bytes())),
        }
    }

    /// Removes the headers whose name, in the case it was written, `unwanted` picks.
    pub(crate) fn remove(&mut self, unwanted: impl Fn(&[u8]) -> bool) {
        match &mut self.held {
            Held::Spans(BufferedHeaders { buffer, spans, added }) => {
                let name = |span: &HeaderSpan| {
                    buffer.get(span.name.0 as usize..span.name.1 as usize).unwrap_or_default()
                };
                spans.retain(|span| !unwanted(name(span)));
                added.retain(|(name, _)| !unwanted(name.as_str().as_bytes()));
            }
            Held::Map(map) => {
                let names: Vec<HeaderName> =
                    map.keys().filter(|name| unwanted(name.as_str().as_bytes())).cloned().collect();
                for name in names {
                    map.remove(name);
                }
            }
        }
    }

    /// Gives a field this one value.
    pub(crate) fn set(&mut self, name: HeaderName, value: HeaderValue) {
        self.remove(|held| held.eq_ignore_ascii_case(name.as_str().as_bytes()));
        self.add(name, value);
    }

    /// Adds a field.
    pub(crate) fn add(&mut self, name: HeaderName, value: HeaderValue) {
        self.names.insert(name.as_str().as_bytes());
        match &mut self.held {
            Held::Spans(headers) => headers.added.push((name, value)),
            Held::Map(map) => {
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
        match &self.held {
            Held::Spans(headers) => headers.iter().for_each(|(name, value)| line(name, value)),
            Held::Map(map) => {
                for (name, value) in map.iter().filter(|(name, _)| *name != COOKIE) {
                    line(name.as_str().as_bytes(), value.as_bytes());
                }
                // HTTP/2 may divide them; HTTP/1.1 may not (RFC 9113, section 8.2.3).
                let cookies: Vec<&[u8]> =
                    map.get_all(COOKIE).iter().map(HeaderValue::as_bytes).collect();
                if !cookies.is_empty() {
                    line(COOKIE.as_str().as_bytes(), &cookies.join(&b"; "[..]));
                }
            }
        }
    }

    /// The headers as a map, for HTTP/2. A field that no map may hold is left out: it was checked
    /// when it was read, so there is none.
    pub(crate) fn into_map(self) -> HeaderMap {
        match self.held {
            Held::Map(mut map) => {
                let size = |(name, value): (&HeaderName, &HeaderValue)| {
                    name.as_str().len() + value.as_bytes().len()
                };
                if map.iter().map(size).sum::<usize>() > SHARED_BYTES {
                    map.values_mut().for_each(|value| *value = apart(value));
                }
                map
            }
            Held::Spans(headers) => headers.to_map(),
        }
    }

    /// The headers as a map of their own: it shares no room with the buffer that they were read into, or
    /// whoever remembers one value would keep that buffer.
    pub(crate) fn to_map(&self) -> HeaderMap {
        match &self.held {
            Held::Map(map) => map.clone(),
            Held::Spans(headers) => headers.to_map(),
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
