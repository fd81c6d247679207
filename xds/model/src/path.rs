//! Paths of requests: the spellings of one, and the ways in which services read it.

/// The one spelling of a path: escapes are decoded, and only what may not be written otherwise is
/// escaped, in upper case; empty and dot segments are resolved. An escaped slash stays one.
#[must_use]
pub fn canonical(path: &str) -> String {
    let segments = path.strip_prefix('/').unwrap_or(path).split('/');
    let segments = segments.map(|segment| decoded(segment.as_bytes())).collect();
    spelled(&resolved(segments, Shape { merges: true, resolves: true }))
}

/// What becomes of a path's segments.
#[derive(Debug, Clone, Copy)]
struct Shape {
    /// Whether empty segments are removed.
    merges: bool,
    /// Whether dot segments are resolved (RFC 3986, section 5.2.4).
    resolves: bool,
}

/// Decodes every escape once. A `%` without two digits behind it stays.
fn decoded(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let [byte, behind @ ..] = rest {
        let escaped = match behind {
            [high, low, ..] if *byte == b'%' => {
                digit(*high).zip(digit(*low)).map(|(high, low)| high * 16 + low)
            }
            _ => None,
        };
        out.push(escaped.unwrap_or(*byte));
        rest = if escaped.is_some() { behind.get(2..).unwrap_or_default() } else { behind };
    }
    out
}

fn digit(byte: u8) -> Option<u8> {
    char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok())
}

fn resolved(segments: Vec<Vec<u8>>, shape: Shape) -> Vec<Vec<u8>> {
    let mut kept: Vec<Vec<u8>> = Vec::with_capacity(segments.len());
    let mut segments = segments.into_iter().peekable();
    while let Some(segment) = segments.next() {
        let is_last = segments.peek().is_none();
        let is_dots = matches!(segment.as_slice(), b"." | b"..") && shape.resolves;
        if is_dots {
            if segment.len() == 2 {
                kept.pop();
            }
            if is_last {
                kept.push(Vec::new());
            }
        } else if !segment.is_empty() || is_last || !shape.merges {
            kept.push(segment);
        }
    }
    kept
}

/// Writes segments as a path.
fn spelled(segments: &[Vec<u8>]) -> String {
    let mut out = String::new();
    for segment in segments {
        out.push('/');
        for byte in segment {
            if is_literal(*byte) {
                out.push(char::from(*byte));
            } else {
                out.push('%');
                out.extend([byte >> 4, byte & 15].map(hexadecimal));
            }
        }
    }
    out
}

fn hexadecimal(digit: u8) -> char {
    char::from_digit(u32::from(digit), 16).unwrap_or('0').to_ascii_uppercase()
}

/// Whether a byte of a segment needs no escape: `pchar` of RFC 3986, section 3.3.
fn is_literal(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=:@".contains(&byte)
}
