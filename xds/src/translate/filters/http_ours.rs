//! HTTP settings for which Envoy has no field: the filter chain's metadata, under `weft`.

use std::collections::BTreeMap;
use std::time::Duration;

use weft_model::{
    AmbiguousPath, ClientCertificateDetails, DesyncMode, ForwardedFor, HostPort, HttpFilter,
    HttpLimits, HttpService,
};

use super::super::pb::google;
use super::super::struct_value::{StructFields, flag, number, object, text};
use super::super::{FieldError, MessageReader};
use super::jwt;
use super::jwt_ours::{self, OurProvider};

/// The fields of the metadata.
const DESYNC: &str = "desync_mode";
const FORWARDED_FOR: &str = "forwarded_for";
const CLIENT_PORT: &str = "forwarded_client_port";
const HOST_PORT: &str = "host_port";
const UNDERSCORES: &str = "underscores";
const PATH: &str = "path";
const TARGET_LIMIT: &str = "target_limit_bytes";
const FIELD_LIMIT: &str = "field_limit_bytes";
const STALL: &str = "stall_timeout_ms";
const TOKENS: &str = "jwt";
const CERTIFICATE: &str = "client_certificate";
const OURS: [&str; 11] = [
    DESYNC,
    FORWARDED_FOR,
    CLIENT_PORT,
    HOST_PORT,
    UNDERSCORES,
    PATH,
    TARGET_LIMIT,
    FIELD_LIMIT,
    STALL,
    TOKENS,
    CERTIFICATE,
];

/// The HTTP settings of a chain's weft metadata.
#[derive(Debug, Default)]
pub(crate) struct OurHttp {
    pub(super) desync: Option<DesyncMode>,
    pub(super) removes_forwarded: bool,
    pub(super) client_port: Option<bool>,
    pub(super) canonical_host_port: bool,
    pub(super) allows_underscores: bool,
    pub(super) ambiguous_paths: Option<AmbiguousPath>,
    pub(super) target_bytes: Option<usize>,
    pub(super) header_bytes: Option<usize>,
    pub(super) stall: Option<Duration>,
    pub(super) tokens: BTreeMap<String, OurProvider>,
    pub(super) certificate: Option<ClientCertificateDetails>,
}

impl OurHttp {
    /// Reads one field of the metadata.
    pub(crate) fn read(
        &mut self,
        field: &str,
        mut value: MessageReader<'_>,
    ) -> Result<(), FieldError> {
        if field == TOKENS {
            self.tokens = jwt_ours::read(value)?;
            return Ok(());
        }
        let word = value.text("string_value");
        let refuse = |value: &MessageReader<'_>, right: &str| {
            value.refuse("", format!("invalid value {word:?} for {field}: must be {right}"))
        };
        match field {
            DESYNC => {
                let mode = DesyncMode::named(&word);
                self.desync =
                    Some(mode.ok_or_else(|| refuse(&value, "monitor, defensive or strictest"))?);
            }
            FORWARDED_FOR if word == "remove" => self.removes_forwarded = true,
            FORWARDED_FOR => {
                let right = "remove; use use_remote_address and skip_xff_append for other modes";
                return Err(refuse(&value, right));
            }
            HOST_PORT if word == "canonical" => self.canonical_host_port = true,
            HOST_PORT => {
                let right = "canonical; use strip_any_host_port and strip_matching_host_port for other modes";
                return Err(refuse(&value, right));
            }
            PATH if word == "as_sent" => {
                self.ambiguous_paths = Some(AmbiguousPath::RouteNormalized);
            }
            PATH if word == "strict" => self.ambiguous_paths = Some(AmbiguousPath::Refuse),
            PATH => {
                return Err(refuse(
                    &value,
                    "as_sent or strict; use normalize_path for other modes",
                ));
            }
            UNDERSCORES if word == "allow" => self.allows_underscores = true,
            UNDERSCORES => {
                return Err(refuse(
                    &value,
                    "allow; use headers_with_underscores_action for other modes",
                ));
            }
            CERTIFICATE if word == "whole" => {
                self.certificate = Some(ClientCertificateDetails::SanitizeSetWhole);
            }
            CERTIFICATE => {
                let right = "whole; use forward_client_cert_details for other modes";
                return Err(refuse(&value, right));
            }
            CLIENT_PORT => self.client_port = value.flag("bool_value"),
            TARGET_LIMIT => self.target_bytes = Some(size(&mut value, field)?),
            FIELD_LIMIT => self.header_bytes = Some(size(&mut value, field)?),
            STALL => {
                let milliseconds = size(&mut value, field)?;
                self.stall = Some(Duration::from_millis(milliseconds as u64));
            }
            other => {
                let known = OURS.join(", ");
                return Err(
                    value.refuse("", format!("unknown field {other:?}: must be one of {known}"))
                );
            }
        }
        Ok(())
    }
}

fn size(value: &mut MessageReader<'_>, field: &str) -> Result<usize, FieldError> {
    let number = value.number("number_value").and_then(|n| usize::try_from(n).ok());
    number
        .filter(|n| *n > 0)
        .ok_or_else(|| value.refuse("", format!("{field} must be a whole number above 0")))
}

/// Encodes the weft metadata of an HTTP filter chain: the settings that differ from the defaults.
pub(crate) fn encode_our_http(http: &HttpService) -> StructFields {
    let mut ours = StructFields::new();
    let mut add = |name: &str, differs: bool, value: google::Value| {
        if differs {
            ours.insert(name.into(), value);
        }
    };
    add(DESYNC, http.desync != DesyncMode::default(), text(http.desync.word()));
    add(FORWARDED_FOR, http.forwarded.addresses == ForwardedFor::Remove, text("remove"));
    add(CLIENT_PORT, http.forwarded.client_port, flag(true));
    add(HOST_PORT, http.host_port == HostPort::Canonical, text("canonical"));
    match http.path.ambiguous {
        AmbiguousPath::RouteAsSent => {}
        AmbiguousPath::RouteNormalized => add(PATH, true, text("as_sent")),
        AmbiguousPath::Refuse => add(PATH, true, text("strict")),
    }
    let whole = http.client_certificate == ClientCertificateDetails::SanitizeSetWhole;
    add(CERTIFICATE, whole, text("whole"));
    // By default both equal the head limit.
    let HttpLimits { head_bytes, target_bytes, header_bytes, .. } = http.limits;
    add(TARGET_LIMIT, target_bytes < head_bytes, number(target_bytes as u64));
    add(FIELD_LIMIT, header_bytes < head_bytes, number(header_bytes as u64));
    if let Some(stall) = http.timeouts.stall {
        add(STALL, true, number(u64::try_from(stall.as_millis()).unwrap_or(u64::MAX)));
    }
    for filter in &http.filters {
        if let HttpFilter::Jwt(policy) = filter {
            let providers = jwt::encode_ours(policy);
            add(TOKENS, !providers.is_empty(), object(providers));
        }
    }
    ours
}
