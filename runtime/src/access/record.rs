//! The access log record: one schema for requests, connections, flows and TLS handshakes.
//!
//! Fields have the names of Envoy's command operators where there is one. A value that does not exist is omitted. Names
//! and closed sets are never mixed with text for people, which is in `error_detail` only. `docs/log-fields.md` is
//! generated from [`FIELDS`].

use std::net::SocketAddr;
use std::time::Duration;

use serde::{Serialize, Serializer};

use super::values::ResponseFlag;

/// What a record is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum RecordKind {
    /// An HTTP request.
    Http,
    /// A TCP connection.
    Tcp,
    /// A UDP flow.
    Udp,
    /// A TLS handshake with a client.
    Tls,
}

/// The documentation of a field.
#[derive(Debug, Clone, Copy)]
pub struct FieldInfo {
    /// The name in JSON.
    pub name: &'static str,
    /// The kinds of records that have the field.
    pub kinds: &'static [RecordKind],
    /// The JSON type, with unit or format.
    pub json: &'static str,
    /// The lines of the meaning.
    pub meaning: &'static [&'static str],
}

/// The wall clock at the start, in UTC with milliseconds (RFC 3339).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StartTime {
    unix_ms: u64,
}

impl StartTime {
    /// The start of what ended at `ended_unix_ms`, milliseconds since the Unix epoch, and took `duration`.
    #[must_use]
    pub fn before_end(ended_unix_ms: u128, duration: Duration) -> Self {
        let unix_ms = ended_unix_ms.saturating_sub(duration.as_millis());
        Self { unix_ms: u64::try_from(unix_ms).unwrap_or(u64::MAX) }
    }

    /// Writes `2026-12-31T23:59:59.999Z`. By hand, because `format!` with seven numbers takes longer than the rest of
    /// a record.
    fn text(self) -> [u8; 24] {
        const DAY_MS: u64 = 86_400_000;
        let date = Date::of_day(self.unix_ms / DAY_MS);
        let of_day = self.unix_ms % DAY_MS;
        let mut text = *b"0000-00-00T00:00:00.000Z";
        put_digits(text.get_mut(0..4), date.year);
        put_digits(text.get_mut(5..7), date.month);
        put_digits(text.get_mut(8..10), date.day);
        put_digits(text.get_mut(11..13), of_day / 3_600_000);
        put_digits(text.get_mut(14..16), of_day / 60_000 % 60);
        put_digits(text.get_mut(17..19), of_day / 1000 % 60);
        put_digits(text.get_mut(20..23), of_day % 1000);
        text
    }
}

impl Serialize for StartTime {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(std::str::from_utf8(&self.text()).unwrap_or_default())
    }
}

/// Writes the last digits of a number.
fn put_digits(text: Option<&mut [u8]>, mut number: u64) {
    for digit in text.into_iter().flatten().rev() {
        *digit = b'0' + u8::try_from(number % 10).unwrap_or_default();
        number /= 10;
    }
}

/// A day of the Gregorian calendar.
#[derive(Debug, PartialEq, Eq)]
struct Date {
    year: u64,
    month: u64,
    day: u64,
}

impl Date {
    /// The date of a day since the Unix epoch. Years are counted from March, so that a leap day is the last of its year.
    fn of_day(day: u64) -> Self {
        const ERA_DAYS: u64 = 146_097;
        let day = day + 719_468;
        let of_era = day % ERA_DAYS;
        let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
        let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let from_march = (5 * of_year + 2) / 153;
        let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
        let year = day / ERA_DAYS * 400 + year_of_era + u64::from(month <= 2);
        Self { year, month, day: of_year - (153 * from_march + 2) / 5 + 1 }
    }
}

/// A random identifier of a TLS connection, in the form of AWS load balancers.
#[derive(Debug, Clone, Copy)]
pub struct ConnectionTraceId(u128);

impl ConnectionTraceId {
    /// The identifier made from this random number.
    #[must_use]
    pub fn new(random: u128) -> Self {
        Self(random)
    }
}

impl Serialize for ConnectionTraceId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("TID_{:032x}", self.0))
    }
}

/// Defines the record and [`FIELDS`] from one list.
macro_rules! record_fields {
    (
        required { $($(#[doc = $req_doc:literal])+ $req:ident: $req_type:ty, $req_json:literal;)* }
        optional { $($(#[doc = $doc:literal])+ [$($kind:ident)+] $name:ident: $type:ty, $json:literal;)* }
    ) => {
        /// One line of the access log. See the module documentation.
        #[derive(Debug, Serialize)]
        pub struct AccessRecord<'a> {
            $($(#[doc = $req_doc])+ pub $req: $req_type,)*
            $($(#[doc = $doc])+ #[serde(skip_serializing_if = "Option::is_none")] pub $name: Option<$type>,)*
        }

        /// Every field, in the order of a line.
        pub const FIELDS: &[FieldInfo] = &[
            $(FieldInfo {
                name: stringify!($req),
                kinds: &[RecordKind::Http, RecordKind::Tcp, RecordKind::Udp, RecordKind::Tls],
                json: $req_json,
                meaning: &[$($req_doc),+],
            },)*
            $(FieldInfo {
                name: stringify!($name),
                kinds: &[$(RecordKind::$kind),+],
                json: $json,
                meaning: &[$($doc),+],
            },)*
        ];

        impl<'a> AccessRecord<'a> {
            /// A record that has only the required fields and the duration.
            #[must_use]
            pub fn new(
                kind: RecordKind,
                ended_unix_ms: u128,
                duration: Duration,
                client: SocketAddr,
            ) -> Self {
                let mut record = Self {
                    kind,
                    start_time: StartTime::before_end(ended_unix_ms, duration),
                    downstream_remote_address: client,
                    $($name: None,)*
                };
                record.duration_us = Some(u64::try_from(duration.as_micros()).unwrap_or(u64::MAX));
                record
            }
        }
    };
}

record_fields! {
    required {
        /// What the line is about: `http` (a request), `tcp` (a connection), `udp` (a flow) or `tls` (a handshake with
        /// a client).
        kind: RecordKind, "string";
        /// When the request, connection, flow or handshake began. For a flow without `duration_us`: when the flow
        /// ended.
        start_time: StartTime, "string, RFC 3339 in UTC with milliseconds";
        /// Address of the client.
        downstream_remote_address: SocketAddr, "string, IP:PORT";
    }
    optional {
        /// Time from `start_time` to the end. Absent for a flow of the kernel path if conntrack has no timestamp of its
        /// start.
        [Http Tcp Udp Tls] duration_us: u64, "integer, microseconds";
        /// Original destination: the address that the client connected or sent to, before the redirect.
        [Http Tcp Udp Tls] downstream_local_address: SocketAddr, "string, IP:PORT";
        /// Protocol: `HTTP/1.0`, `HTTP/1.1`, `HTTP/2`, `TCP` or `UDP`.
        [Http Tcp Udp] protocol: &'static str, "string";
        /// Request method.
        [Http] method: &'a str, "string";
        /// `host` header or `:authority` of the request, as received.
        [Http] authority: &'a str, "string";
        /// Path of the request without its query, as received.
        [Http] path: &'a str, "string";
        /// `x-request-id` header of the request, as received.
        [Http] request_id: &'a str, "string";
        /// HTTP status of the response. For a gRPC call that weft refuses: the status of the refusal, although the client
        /// gets 200 with `grpc-status`.
        [Http] response_code: u16, "integer";
        /// Response flag, with the code of Envoy.
        [Http Tcp Udp] response_flags: ResponseFlag, "string";
        /// What decided the response.
        [Http] response_code_details: &'static str, "string";
        /// Why the connection or flow ended.
        [Tcp Udp] connection_termination_details: &'static str, "string";
        /// Why an endpoint could not be connected to or sent an invalid response.
        [Http Tcp] upstream_failure_reason: &'static str, "string";
        /// What exactly was wrong, as text for people. The text may change between versions.
        [Http Tls] error_detail: &'a str, "string";
        /// Body bytes received from the client and forwarded; for TCP and UDP, payload bytes.
        [Http Tcp Udp] bytes_received: u64, "integer, bytes";
        /// Body bytes of the endpoint sent to the client; for TCP and UDP, payload bytes.
        [Http Tcp Udp] bytes_sent: u64, "integer, bytes";
        /// Virtual host that matched; for TCP and UDP, the cluster.
        [Http Tcp Udp] service: &'a str, "string";
        /// Route that matched, if it has a name.
        [Http] route_name: &'a str, "string";
        /// Cluster that the request, connection or flow was sent to.
        [Http Tcp Udp] upstream_cluster: &'a str, "string";
        /// Endpoint that was tried last.
        [Http Tcp Udp] upstream_host: SocketAddr, "string, IP:PORT";
        /// Policy that allowed or denied the request or connection; absent if no policy matched.
        [Http Tcp] matched_policy: &'a str, "string";
        /// `true` if policies in dry-run mode would deny the request.
        [Http] dry_run_denied: bool, "boolean";
        /// Policy in dry-run mode that would deny the request; absent if the request would be denied because no policy
        /// allows it.
        [Http] dry_run_policy: &'a str, "string";
        /// `sub` claim of the verified token.
        [Http] jwt_subject: &'a str, "string";
        /// How the request departs from strict HTTP/1.1, with the names of AWS (`classification_reason`).
        [Http] desync_reason: &'static str, "string";
        /// Path through the agent: `kernel` or `proxy`.
        [Tcp Udp] data_path: &'static str, "string, agent only";
        /// How the endpoint was chosen: `flow_hash`, `original_destination` or `none`.
        [Tcp Udp] endpoint_selection: &'static str, "string, agent only";
        /// TLS version of the client connection: `TLSv1.2` or `TLSv1.3`.
        [Http Tcp Tls] downstream_tls_version: &'static str, "string";
        /// Cipher suite of the client connection.
        [Tls] downstream_tls_cipher: &'static str, "string";
        /// Key exchange group of the handshake.
        [Tls] downstream_tls_group: &'a str, "string";
        /// Whether the handshake resumed a session.
        [Tls] downstream_tls_resumed: bool, "boolean";
        /// Result of the handshake: `success`, `unverified` (the client certificate is passed to the service without
        /// verification) or `failed`.
        [Tls] downstream_tls_result: &'static str, "string";
        /// Why the handshake failed, with the names of AWS load balancers.
        [Tls] downstream_transport_failure_reason: &'static str, "string";
        /// SPIFFE ID of the client, from its verified certificate.
        [Http Tcp Tls] downstream_peer_uri_san: &'a str, "string";
        /// Subject of the client certificate, verified or not (RFC 2253).
        [Tls] downstream_peer_subject: &'a str, "string";
        /// Serial number of the client certificate, verified or not.
        [Tls] downstream_peer_serial: &'a str, "string, hexadecimal";
        /// Start of the validity of the client certificate.
        [Tls] downstream_peer_cert_v_start: &'a str, "string, RFC 3339";
        /// End of the validity of the client certificate.
        [Tls] downstream_peer_cert_v_end: &'a str, "string, RFC 3339";
        /// Random identifier of a TLS connection, equal in the lines of its handshake and of its requests.
        [Http Tcp Tls] conn_trace_id: ConnectionTraceId, "string";
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn start_time_is_rfc_3339_with_milliseconds() {
        let check = |unix_ms: u128, expected: &str| {
            let time = StartTime::before_end(unix_ms, Duration::ZERO);
            assert_eq!(serde_json::to_value(time).ok(), Some(expected.into()));
        };
        check(0, "1970-01-01T00:00:00.000Z");
        check(951_782_400_001, "2000-02-29T00:00:00.001Z");
        check(1_709_251_199_999, "2024-02-29T23:59:59.999Z");
        check(1_709_251_200_000, "2024-03-01T00:00:00.000Z");
        check(1_735_689_599_000, "2024-12-31T23:59:59.000Z");
        check(4_107_542_400_000, "2100-03-01T00:00:00.000Z");
    }

    #[test]
    fn absent_values_are_omitted() {
        let client = ([192, 0, 2, 1], 4000).into();
        let record = AccessRecord {
            response_code: Some(200),
            ..AccessRecord::new(RecordKind::Http, 5000, Duration::from_millis(1500), client)
        };
        let line = serde_json::to_string(&record).expect("a record is JSON");
        assert_eq!(
            line,
            "{\"kind\":\"http\",\"start_time\":\"1970-01-01T00:00:03.500Z\",\
             \"downstream_remote_address\":\"192.0.2.1:4000\",\"duration_us\":1500000,\
             \"response_code\":200}"
        );
    }

    #[test]
    fn every_field_is_documented_once() {
        let names: std::collections::BTreeSet<_> = FIELDS.iter().map(|field| field.name).collect();
        assert_eq!(names.len(), FIELDS.len());
        assert!(
            FIELDS.iter().all(|field| field.meaning.last().is_some_and(|line| line.ends_with('.')))
        );
    }
}
