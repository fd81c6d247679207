//! Generates streams of requests from a seed: valid ones by a grammar, then damaged in ways that make parsers disagree.

use fastrand::Rng;

/// The bytes that a client sends on one connection.
#[derive(Debug, Clone)]
pub(super) struct RequestStream {
    pub(super) bytes: Vec<u8>,
    /// The offsets at which the bytes are split into writes, in ascending order.
    pub(super) cuts: Vec<usize>,
}

impl RequestStream {
    /// Generates a stream. Deterministic.
    pub(super) fn of_seed(seed: u64) -> Self {
        let mut rng = Rng::with_seed(seed);
        let mut messages: Vec<GeneratedRequest> =
            (0..rng.usize(1..=4)).map(|_| GeneratedRequest::valid(&mut rng)).collect();
        let mut in_lines = 0;
        let mut in_bytes = 0;
        for _ in 0..[0, 0, 1, 1, 1, 2, 2, 3][rng.usize(..8)] {
            *(if rng.bool() { &mut in_lines } else { &mut in_bytes }) += 1;
        }
        for _ in 0..in_lines {
            let message = rng.usize(..messages.len());
            messages[message].damage(&mut rng);
        }
        let mut bytes = messages.iter().flat_map(GeneratedRequest::bytes).collect();
        for _ in 0..in_bytes {
            damage_bytes(&mut bytes, &mut rng);
        }
        let mut cuts: Vec<usize> = match rng.usize(..4) {
            0 => Vec::new(),
            1 => line_ends(&bytes),
            _ => (0..rng.usize(1..8)).map(|_| rng.usize(..=bytes.len())).collect(),
        };
        cuts.sort_unstable();
        Self { bytes, cuts }
    }

    /// The stream without the bytes from `at` up to `at + count`.
    pub(super) fn without(&self, at: usize, count: usize) -> Self {
        let mut bytes = self.bytes.clone();
        bytes.drain(at..(at + count).min(self.bytes.len()));
        let moved = |cut: &usize| if *cut > at { cut.saturating_sub(count).max(at) } else { *cut };
        Self { bytes, cuts: self.cuts.iter().map(moved).collect() }
    }

    /// The bytes of each write.
    pub(super) fn parts(&self) -> impl Iterator<Item = &[u8]> {
        let starts = std::iter::once(0).chain(self.cuts.iter().copied());
        let ends = self.cuts.iter().copied().chain(std::iter::once(self.bytes.len()));
        starts.zip(ends).map(|(start, end)| &self.bytes[start..end])
    }
}

fn pick<'a, T: ?Sized>(rng: &mut Rng, of: &[&'a T]) -> &'a T {
    of[rng.usize(..of.len())]
}

const METHODS: &[&str] = &["GET", "GET", "POST", "POST", "PUT", "HEAD", "DELETE", "PATCH", "X-Y"];
const TARGETS: &[&str] = &[
    "/",
    "/a/b.c?d=e&f",
    "/%2e%2E/x",
    "/a//b/../c;d",
    "/?",
    "/x?y?z/",
    "http://a.example/x?y",
    "http://b.example:8080",
    "HTTPS://c.example?q",
    "http://[::1]:80/",
];
const VERSIONS: &[&str] = &["HTTP/1.1", "HTTP/1.1", "HTTP/1.1", "HTTP/1.1", "HTTP/1.0"];
const HOSTS: &[&str] = &["a.example", "a.example:80", "10.0.0.1:8080", "[::1]", "A_b.example"];
const HEADERS: &[&str] = &[
    "Accept: */*",
    "X-Empty:",
    "X-Tight:v",
    "x-spaces: \t a  b \t ",
    "Cookie: a=b; c=d",
    "Connection: keep-alive",
    "Connection: keep-alive",
    "Connection: X-Hop, keep-alive,,",
    "Connection: Upgrade",
    "connection: close",
    "X-Hop: 1",
    "TE: trailers, deflate",
    "Trailer: X-Sum",
    "Expect: 100-continue",
    "Upgrade: websocket",
    "Keep-Alive: timeout=5",
    "Proxy-Connection: keep-alive",
    "X_under: 1",
    "X-!#$%&'*+.^`|~: \"q, q\"",
    "Content-Type: application/grpc",
];
/// Bodies. Some contain a request, which a parser finds when it misreads the end of the body.
const BODIES: &[&str] = &[
    "",
    "x",
    "a body",
    "\r\n",
    "0\r\n\r\n",
    "GET /smuggled HTTP/1.1\r\nHost: s.example\r\n\r\n",
    "0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: s.example\r\n\r\n",
];
const CHUNK_ENDS: &[&str] = &["", "\n", "\r", "\n\n", "\r\r", " \r\n", "\r\n\r\n", "x\r\n", "\n\r"];
const EXTENSIONS: &[&str] = &["", "", "", ";", ";a", ";a=b", " ; a=\"b;c\"", "\t", ";a=b;c", " "];
const TRAILERS: &[&str] = &[
    "X-Sum: 1\r\n",
    "x-sum:\r\n",
    "X-Hop: 2\r\nX-Sum: 3\r\n",
    "Content-Length: 3\r\n",
    "Connection: close\r\n",
];

/// A request, in lines.
struct GeneratedRequest {
    /// The request line and the headers, without line ends.
    lines: Vec<Vec<u8>>,
    body: Vec<u8>,
}

impl GeneratedRequest {
    fn valid(rng: &mut Rng) -> Self {
        let mut method = pick(rng, METHODS);
        let mut target = pick(rng, TARGETS).to_owned();
        match rng.usize(..40) {
            0 => (method, target) = ("OPTIONS", "*".to_owned()),
            1 => (method, target) = ("CONNECT", "d.example:443".to_owned()),
            2 => target = format!("/{}", "t".repeat(rng.usize(240..260))),
            _ => {}
        }
        let version = pick(rng, VERSIONS);
        let mut headers = vec![format!("Host: {}", pick(rng, HOSTS))];
        for _ in 0..rng.usize(..5) {
            headers.push(pick(rng, HEADERS).to_owned());
        }
        match rng.usize(..60) {
            0 => {
                let long = format!("X-Long: {}", "l".repeat(rng.usize(490..520)));
                headers.extend(vec![long; rng.usize(1..=3)]);
            }
            1 => (0..rng.usize(9..16)).for_each(|n| headers.push(format!("X-{n}: {n}"))),
            _ => {}
        }
        let mut body = Vec::new();
        let has_none = ["GET", "HEAD", "CONNECT"].contains(&method);
        if !has_none || rng.u8(..8) == 0 {
            let may_be_chunked = version == "HTTP/1.1" || rng.u8(..8) == 0;
            if may_be_chunked && rng.bool() {
                headers.push("Transfer-Encoding: chunked".to_owned());
                body = chunked(rng);
            } else {
                let text = pick(rng, BODIES);
                headers.push(format!("Content-Length: {}", text.len()));
                body.extend_from_slice(text.as_bytes());
            }
        }
        rng.shuffle(&mut headers);
        let lines = std::iter::once(format!("{method} {target} {version}")).chain(headers);
        Self { lines: lines.map(String::into_bytes).collect(), body }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.lines.join(&b"\r\n"[..]);
        bytes.extend_from_slice(b"\r\n\r\n");
        bytes.extend_from_slice(&self.body);
        bytes
    }

    fn damage(&mut self, rng: &mut Rng) {
        let one = rng.usize(..self.lines.len());
        let other = rng.usize(..self.lines.len());
        match rng.usize(..12) {
            0 => self.lines.insert(other, self.lines[one].clone()),
            1 => self.lines.swap(one, other),
            2 if self.lines.len() > 1 => drop(self.lines.remove(one)),
            3 => self.lines.insert(one.max(1), pick(rng, LINES).to_vec()),
            4 => self.change_request_line(rng),
            5 => damage_bytes(&mut self.body, rng),
            _ => self.change_framing(rng),
        }
    }

    fn change_request_line(&mut self, rng: &mut Rng) {
        let line = String::from_utf8_lossy(&self.lines[0]).into_owned();
        let (from, to) = *pick(
            rng,
            &[
                &("HTTP/1.1", "HTTP/1.2"),
                &("HTTP/1.1", "HTTP/1.0"),
                &("HTTP/1.", "HTTP/2."),
                &("HTTP", "http"),
                &(" ", "  "),
                &(" ", "\t"),
                &(" /", " /a b"),
                &(" /", " /\u{e9}"),
                &(" /", " /\"<>\\^`{|}"),
                &(" /", " http://u@b/"),
                &(" /", " //"),
                &(" /", " x"),
                &("?", "#"),
                &("E", "e"),
            ],
        );
        self.lines[0] = line.replacen(from, to, 1).into_bytes();
    }

    /// Adds a framing header or a similar one, or replaces the existing one.
    fn change_framing(&mut self, rng: &mut Rng) {
        let names = if rng.bool() { &FRAMING_NAMES[..2] } else { FRAMING_NAMES };
        let name = pick(rng, names);
        let looks_coded = name.to_ascii_lowercase().starts_with("transfer");
        let value = if looks_coded || rng.u8(..8) == 0 {
            pick(rng, CODINGS).to_owned()
        } else {
            let length = self.body.len();
            pick(rng, LENGTHS).replace('N', &length.to_string())
        };
        let line = format!("{name}:{value}").into_bytes();
        let frames = |line: &Vec<u8>| line.starts_with(b"Content-L") || line.starts_with(b"Transf");
        match self.lines.iter().position(frames) {
            Some(at) if rng.u8(..4) != 0 => self.lines[at] = line,
            _ => self.lines.insert(rng.usize(1..=self.lines.len()), line),
        }
    }
}

const LINES: &[&[u8]] = &[
    b" folded",
    b"\tfolded",
    b" a: b",
    b": b",
    b"no colon",
    b"",
    b" ",
    b"Host: z.example",
    b"host:z.example",
];
/// The two valid names first.
const FRAMING_NAMES: &[&str] = &[
    "Content-Length",
    "Transfer-Encoding",
    "CONTENT-LENGTH",
    "Content_Length",
    "Content-Length ",
    "Content-Length\u{b}",
    " Content-Length",
    "ContentLength",
    "TRANSFER-ENCODING",
    "Transfer_Encoding",
    "Transfer-Encoding\t",
    "Transfer-Encoding\0",
    "Transfer--Encoding",
];
const LENGTHS: &[&str] = &[
    " N",
    "N",
    " 0N",
    " 000000000000000000000N",
    " N ",
    "\tN\t",
    " +N",
    " -N",
    " -0",
    " N,N",
    " N, N",
    " N,",
    " N;",
    " N N",
    " 0xN",
    " N.0",
    " Ne0",
    " N_",
    " N\u{b}",
    " N\u{c}",
    " \u{a0}N",
    " 1N",
    " 0",
    " 1",
    "",
    " 1099511627777",
    " 18446744073709551617",
    " 99999999999999999999999",
];
const CODINGS: &[&str] = &[
    " chunked",
    "chunked",
    " Chunked",
    " chunked ",
    "\tchunked\t",
    " chunked,",
    " ,chunked",
    " chunked;q=1",
    " \"chunked\"",
    " identity",
    " gzip, chunked",
    " chunked, gzip",
    " xchunked",
    " chunkedx",
    " chunked\u{b}",
    " \u{c}chunked",
    " chun ked",
    " chunked, chunked",
    "",
    " chunked\u{a0}",
    " trailers",
];
const SIZES: &[&str] = &[
    "+N",
    "-N",
    "0xN",
    " N",
    "N ",
    "N\t",
    "0N",
    "00000000000N",
    "0000000000000000N",
    "N,",
    "N_",
    "Nh",
    "N;\t;",
    "",
    "N\u{b}",
    "N\r",
    "N;\r",
    "N;\n",
    "N;\0",
    "N;\u{e9}",
    "1N",
    "10000000000000000N",
];

fn chunked(rng: &mut Rng) -> Vec<u8> {
    let mut body = Vec::new();
    for _ in 0..rng.usize(..4) {
        let text = pick(rng, BODIES);
        if !text.is_empty() {
            let size = match rng.u8(..16) {
                0 => pick(rng, SIZES).replace('N', &format!("{:x}", text.len())),
                1..4 => format!("{:03X}", text.len()),
                _ => format!("{:x}", text.len()),
            };
            let extension = pick(rng, EXTENSIONS);
            let end = if rng.u8(..24) == 0 { pick(rng, CHUNK_ENDS) } else { "\r\n" };
            body.extend_from_slice(format!("{size}{extension}\r\n{text}{end}").as_bytes());
        }
    }
    let last = pick(rng, &["0", "0", "0", "0", "000", "0;a", "0 "]);
    body.extend_from_slice(last.as_bytes());
    body.extend_from_slice(b"\r\n");
    if rng.u8(..4) == 0 {
        body.extend_from_slice(pick(rng, TRAILERS).as_bytes());
    }
    body.extend_from_slice(b"\r\n");
    body
}

const DANGEROUS: &[u8] = b"\r\n\0 \t;:,+-_0\x0b\x0c\x85\xa0\xff\"\\#%/?@\x7f";

fn line_ends(bytes: &[u8]) -> Vec<usize> {
    bytes.iter().enumerate().filter(|(_, byte)| **byte == b'\n').map(|(at, _)| at).collect()
}

fn damage_bytes(bytes: &mut Vec<u8>, rng: &mut Rng) {
    if bytes.is_empty() {
        return;
    }
    let at = rng.usize(..bytes.len());
    let end = (at + rng.usize(1..24)).min(bytes.len());
    let dangerous = DANGEROUS[rng.usize(..DANGEROUS.len())];
    match rng.usize(..10) {
        0 => bytes[at] = dangerous,
        1 => drop(bytes.remove(at)),
        2 => bytes[at..end].reverse(),
        3 => {
            let run = bytes[at..end].to_vec();
            bytes.splice(at..at, run);
        }
        4 if rng.bool() => bytes.truncate(at),
        5 | 6 => {
            let ends = line_ends(bytes);
            if let Some(at) = ends.get(rng.usize(..ends.len().max(1))) {
                let end: &[u8] =
                    pick(rng, &[b"\n", b"\r", b"\r\r\n", b"\n\r\n", b"\r\n\r\n", b" \r\n"]);
                bytes.splice(at.saturating_sub(1)..=*at, end.iter().copied());
            }
        }
        7 => {
            let digits = bytes.iter().enumerate().filter(|(_, byte)| byte.is_ascii_digit());
            let digits: Vec<usize> = digits.map(|(at, _)| at).collect();
            if let Some(at) = digits.get(rng.usize(..digits.len().max(1))) {
                bytes[*at] = rng.u8(b'0'..=b'9');
            }
        }
        _ => bytes.insert(at, dangerous),
    }
}
