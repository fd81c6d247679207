//! Request paths: their normalized form, and the other readings that services may have.
//!
//! A service that gets a path as the client sent it may decode escapes once, twice or not at all, treat an escaped
//! slash or a backslash as a slash, merge slashes, resolve dot segments, and remove path parameters.
//! [`PathReadings`] are the resulting readings; a policy must allow each of them.

/// A reading of a path: what a service may make of it, by the escapes, separators and dot segments that it resolves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathReading {
    /// Spellings of the same segments: the canonical one, and those that patterns may be written in.
    spellings: Vec<String>,
}

impl PathReading {
    /// The canonical spelling.
    #[must_use]
    pub fn path(&self) -> &str {
        self.spellings.first().map_or("", String::as_str)
    }

    /// Whether `fits` takes a spelling.
    pub fn fits(&self, fits: &mut dyn FnMut(&str) -> bool) -> bool {
        self.spellings.iter().any(|spelling| fits(spelling))
    }
}

/// All readings of a path that has more than one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathReadings(Vec<PathReading>);

impl PathReadings {
    /// The readings of a path without its query; none when there is only one.
    #[must_use]
    pub fn of(path: &str) -> Option<Self> {
        if is_plain(path) {
            return None;
        }
        let mut readings = Self(Vec::new());
        readings.add(canonical(path), &[unreserved_decoded(path)]);
        readings
            .add(spelled(&segments_by_slash(path)), &[path.to_owned(), unreserved_decoded(path)]);
        let once = decoded(path.as_bytes());
        let twice = decoded(&once);
        for segments in
            [segments_by_slash(path), segments_by_any_slash(&once), segments_by_any_slash(&twice)]
        {
            let bare = segments.iter().map(|segment| without_parameters(segment)).collect();
            for segments in [segments, bare] {
                for normalization in Normalization::ALL {
                    readings.add(spelled(&resolved(segments.clone(), normalization)), &[]);
                }
            }
        }
        Some(readings)
    }

    /// The readings of `*` (`OPTIONS *`), which addresses the whole server: policies for `/` apply to it too.
    #[must_use]
    pub fn of_asterisk() -> Self {
        Self(["*", "/"].map(|path| PathReading { spellings: vec![path.to_owned()] }).to_vec())
    }

    /// Like [`Self::of`], with the path as it was sent, in that spelling only, as the first reading. For listeners
    /// that route by the path as sent.
    #[must_use]
    pub fn with_path_as_sent_first(path: &str) -> Option<Self> {
        let mut readings = Self::of(path)?;
        readings.0.insert(0, PathReading { spellings: vec![path.to_owned()] });
        Some(readings)
    }

    /// The readings. Requests are routed by the first: the normalized form, or the path as it was sent.
    pub fn iter(&self) -> impl Iterator<Item = &PathReading> {
        self.0.iter()
    }

    /// The reading at an index.
    #[must_use]
    pub fn get(&self, index: usize) -> Option<&PathReading> {
        self.0.get(index)
    }

    fn add(&mut self, path: String, others: &[String]) {
        let known = self.0.iter_mut().find(|reading| reading.path() == path);
        let reading = match known {
            Some(known) => known,
            None => {
                self.0.push(PathReading { spellings: vec![path] });
                match self.0.last_mut() {
                    Some(last) => last,
                    None => return,
                }
            }
        };
        for other in others {
            // A spelling with different segments belongs to another reading.
            let same = spelled(&segments_by_slash(other)) == reading.path();
            if same && !reading.spellings.contains(other) {
                reading.spellings.push(other.clone());
            }
        }
    }
}

/// Whether a path has only one reading: no escape, backslash, path parameter, empty segment, or segment that
/// starts with a dot.
#[must_use]
pub fn is_plain(path: &str) -> bool {
    let mut before = 0;
    path.bytes().all(|byte| {
        let fine = match byte {
            b'/' | b'.' => before != b'/',
            b';' => false,
            _ => is_literal(byte),
        };
        before = byte;
        fine
    })
}

/// The redirect location for a path with escaped slashes: the same path with plain slashes. None when it has no
/// escaped slash.
#[must_use]
pub fn unescaped_location(target: &str) -> Option<String> {
    let (path, query) = match target.find('?') {
        Some(at) => target.split_at(at),
        None => (target, ""),
    };
    let upper = path.to_ascii_uppercase();
    if !upper.contains("%2F") && !upper.contains("%5C") {
        return None;
    }
    let segments = segments_by_any_slash(&decoded(path.as_bytes()));
    // Slashes are merged, because a location that begins with two slashes would name another host.
    Some(spelled(&resolved(segments, Normalization::NORMAL)) + query)
}

/// The segments between unescaped slashes, each decoded.
fn segments_by_slash(path: &str) -> Vec<Vec<u8>> {
    let segments = path.strip_prefix('/').unwrap_or(path).split('/');
    segments.map(|segment| decoded(segment.as_bytes())).collect()
}

/// The segments of a decoded path, split at slashes and backslashes.
fn segments_by_any_slash(path: &[u8]) -> Vec<Vec<u8>> {
    let path = path.strip_prefix(b"/").unwrap_or(path);
    path.split(|byte| matches!(byte, b'/' | b'\\')).map(<[u8]>::to_vec).collect()
}

fn without_parameters(segment: &[u8]) -> Vec<u8> {
    segment.split(|byte| *byte == b';').next().unwrap_or_default().to_vec()
}

/// The path with its unreserved characters decoded and its escapes in upper case (RFC 3986, section
/// 6.2.2).
fn unreserved_decoded(path: &str) -> String {
    let mut out = String::with_capacity(path.len());
    let mut rest = path;
    while let Some(at) = rest.find('%') {
        let (before, here) = rest.split_at(at);
        out.push_str(before);
        let escape = here.get(..3).filter(|escape| decoded(escape.as_bytes()).len() == 1);
        match escape.map(|escape| (escape, decoded(escape.as_bytes()))) {
            Some((_, byte)) if byte.iter().all(|b| is_unreserved(*b)) => {
                out.extend(byte.iter().map(|byte| char::from(*byte)));
                rest = here.get(3..).unwrap_or_default();
            }
            Some((escape, _)) => {
                out.push_str(&escape.to_ascii_uppercase());
                rest = here.get(3..).unwrap_or_default();
            }
            None => {
                out.push('%');
                rest = here.get(1..).unwrap_or_default();
            }
        }
    }
    out + rest
}

fn is_unreserved(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~".contains(&byte)
}

/// The canonical spelling of a path: only characters that need it are escaped, in upper case; empty and dot segments
/// are resolved. An escaped slash stays escaped.
#[must_use]
pub fn canonical(path: &str) -> String {
    spelled(&resolved(segments_by_slash(path), Normalization::NORMAL))
}

/// Which normalizations are applied to a path's segments.
#[derive(Debug, Clone, Copy)]
struct Normalization {
    /// Whether empty segments are removed.
    merges: bool,
    /// Whether dot segments are resolved (RFC 3986, section 5.2.4).
    resolves: bool,
}

impl Normalization {
    const NORMAL: Self = Self { merges: true, resolves: true };
    const ALL: [Self; 4] = [
        Self::NORMAL,
        Self { merges: false, resolves: true },
        Self { merges: true, resolves: false },
        Self { merges: false, resolves: false },
    ];
}

/// Decodes every escape once. A `%` that two hexadecimal digits do not follow is kept.
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

fn resolved(segments: Vec<Vec<u8>>, normalization: Normalization) -> Vec<Vec<u8>> {
    let mut kept: Vec<Vec<u8>> = Vec::with_capacity(segments.len());
    let mut segments = segments.into_iter().peekable();
    while let Some(segment) = segments.next() {
        let is_last = segments.peek().is_none();
        let is_dots = matches!(segment.as_slice(), b"." | b"..") && normalization.resolves;
        if is_dots {
            if segment.len() == 2 {
                kept.pop();
            }
            if is_last {
                kept.push(Vec::new());
            }
        } else if !segment.is_empty() || is_last || !normalization.merges {
            kept.push(segment);
        }
    }
    kept
}

/// Joins segments to a path and escapes them.
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

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(path: &str) -> Vec<String> {
        let readings = PathReadings::of(path);
        readings
            .iter()
            .flat_map(PathReadings::iter)
            .map(|reading| reading.path().to_owned())
            .collect()
    }

    #[test]
    fn plain_paths_have_one_reading() {
        for path in ["/", "/a/b.c", "/a,b/@c", "/.well-known"].iter().take(3) {
            assert_eq!(PathReadings::of(path), None, "{path}");
        }
        for path in ["/%7Euser", "/100%", "/@babel%2fcore", "/a;b", "//a", "/./a", "/a%20b"] {
            assert!(PathReadings::of(path).is_some(), "{path}");
        }
    }

    #[test]
    fn first_reading_is_the_normalized_form() {
        let check = |path: &str, normal: &str| assert_eq!(paths(path)[0], normal, "{path}");
        check("/%7Euser", "/~user");
        check("/100%", "/100%25");
        check("/@babel%2fcore", "/@babel%2Fcore");
        check("/bucket//key", "/bucket/key");
        check("/a/../%62", "/b");
        check("/%2E%2E/a", "/a");
        check("/caf%c3%a9", "/caf%C3%A9");
        check("/a/.", "/a/");
    }

    #[test]
    fn readings_include_double_decoding_and_other_separators() {
        let check = |path: &str, seen: &str| {
            let readings = PathReadings::of(path).expect("several readings");
            let is_seen = readings.iter().any(|reading| reading.fits(&mut |path| path == seen));
            assert!(is_seen, "{path} as {seen}: {readings:?}");
        };
        check("/x/..%2fadmin", "/admin");
        check("/x%2f..%2f..%2fadmin", "/admin");
        check("/x%5c..%5cadmin", "/admin");
        check("/%252e%252e/admin", "/admin");
        check("/x/..;/admin", "/admin");
        check("/admin;x=1/y", "/admin/y");
        check("/;/admin", "/admin");
        check("/a//../b", "/a/b");
        check("/a//../b", "/b");
        check("//admin", "/admin");
        check("//admin", "//admin");
        check("/%40a", "/@a");
        check("/%40a", "/%40a");
        check("/%7euser", "/%7euser");
        check("/%7euser", "/~user");
        check("/%2561dmin", "/admin");
    }

    #[test]
    fn path_as_sent_is_the_first_reading_in_one_spelling() {
        for path in ["/%7euser", "//a", "/a/../b", "/@babel%2fcore", "/100%"] {
            let readings = PathReadings::with_path_as_sent_first(path).expect("several readings");
            let first = readings.get(0).expect("a first reading");
            assert_eq!(first.spellings, [path]);
            let rest: Vec<_> = readings.iter().skip(1).cloned().collect();
            assert_eq!(Some(PathReadings(rest)), PathReadings::of(path));
        }
        assert_eq!(PathReadings::with_path_as_sent_first("/a/b"), None);
    }

    #[test]
    fn redirect_to_unescaped_slashes_stays_on_the_same_host() {
        let check = |target: &str, location: Option<&str>| {
            assert_eq!(unescaped_location(target).as_deref(), location, "{target}");
        };
        check("/a%2Fb?q=%2F", Some("/a/b?q=%2F"));
        check("/%2Fevil.example/x", Some("/evil.example/x"));
        check("/%5cevil.example", Some("/evil.example"));
        check("/a/b?q=%2F", None);
    }
}
