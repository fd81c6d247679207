//! `TlsParameters`: the versions, cipher suites and curves of a TLS context.
//!
//! Unsupported values are ignored and listed as not honoured when the rest is at least as strict as the configuration. A
//! setting is refused when no supported value is left, or when it requires an unsupported version.

use weft_model::{CipherSuite, KeyExchangeGroup, TlsParameters, TlsVersion};

use super::pb::tls as pb;
use super::{FieldError, MessageReader};

const MINIMUM: &str = "tls_minimum_protocol_version";
const MAXIMUM: &str = "tls_maximum_protocol_version";

/// Suites of BoringSSL without forward secrecy or authenticated encryption, or with pre-shared keys.
const SUITES_NOT_OFFERED: [&str; 17] = [
    "ECDHE-ECDSA-AES128-SHA",
    "ECDHE-ECDSA-AES128-SHA256",
    "ECDHE-ECDSA-AES256-SHA",
    "ECDHE-ECDSA-AES256-SHA384",
    "ECDHE-RSA-AES128-SHA",
    "ECDHE-RSA-AES128-SHA256",
    "ECDHE-RSA-AES256-SHA",
    "ECDHE-RSA-AES256-SHA384",
    "ECDHE-PSK-AES128-CBC-SHA",
    "ECDHE-PSK-AES256-CBC-SHA",
    "AES128-GCM-SHA256",
    "AES128-SHA",
    "AES256-GCM-SHA384",
    "AES256-SHA",
    "PSK-AES128-CBC-SHA",
    "PSK-AES256-CBC-SHA",
    "DES-CBC3-SHA",
];

/// Curves of Envoy that are not offered.
const GROUPS_NOT_OFFERED: [&str; 5] =
    ["P-521", "P-224", "X25519Kyber768Draft00", "CECPQ2", "MLKEM1024"];

/// Reads the parameters.
pub(super) fn decode(mut parameters: MessageReader<'_>) -> Result<TlsParameters, FieldError> {
    let minimum = minimum(&mut parameters)?;
    let maximum = maximum(&mut parameters)?;
    if maximum < minimum {
        let reason = format!(
            "invalid version {}: must not be below {MINIMUM} {}",
            maximum.word(),
            minimum.word()
        );
        return Err(parameters.refuse(MAXIMUM, reason));
    }
    let bounds = TlsParameters { minimum, maximum, ..TlsParameters::default() };
    let cipher_suites = cipher_suites(&mut parameters, &bounds)?;
    let groups = groups(&mut parameters, &bounds)?;
    Ok(TlsParameters { cipher_suites, groups, ..bounds })
}

/// The lowest version. A version below TLS 1.2 only permits more, so it is raised to TLS 1.2.
fn minimum(parameters: &mut MessageReader<'_>) -> Result<TlsVersion, FieldError> {
    match parameters.choice(MINIMUM).as_str() {
        "TLS_AUTO" | "TLSv1_2" => Ok(TlsVersion::V1_2),
        "TLSv1_3" => Ok(TlsVersion::V1_3),
        old @ ("TLSv1_0" | "TLSv1_1") => {
            parameters
                .not_honoured(MINIMUM, &format!("{old} is not supported; the minimum is TLSv1_2"));
            Ok(TlsVersion::V1_2)
        }
        other => Err(parameters.refuse(MINIMUM, unknown_version(other))),
    }
}

fn maximum(parameters: &mut MessageReader<'_>) -> Result<TlsVersion, FieldError> {
    match parameters.choice(MAXIMUM).as_str() {
        "TLS_AUTO" | "TLSv1_3" => Ok(TlsVersion::V1_3),
        "TLSv1_2" => Ok(TlsVersion::V1_2),
        old @ ("TLSv1_0" | "TLSv1_1") => Err(parameters.refuse(
            MAXIMUM,
            format!("unsupported version {old}: must be TLS_AUTO, TLSv1_2 or TLSv1_3"),
        )),
        other => Err(parameters.refuse(MAXIMUM, unknown_version(other))),
    }
}

fn unknown_version(version: &str) -> String {
    format!("unknown version {version}: must be TLS_AUTO, TLSv1_2 or TLSv1_3")
}

/// The suites of TLS 1.2. Brackets with `|` give several suites the same preference, which is not supported: each suite
/// has its own preference.
fn cipher_suites(
    parameters: &mut MessageReader<'_>,
    bounds: &TlsParameters,
) -> Result<Vec<CipherSuite>, FieldError> {
    const FIELD: &str = "cipher_suites";
    let wanted = parameters.texts(FIELD);
    let mut offered = Vec::new();
    for (at, text) in wanted.iter().enumerate() {
        let place = format!("{FIELD}[{at}]");
        let grouped = text.strip_prefix('[').and_then(|text| text.strip_suffix(']'));
        for name in grouped.unwrap_or(text).split('|') {
            if let Some(suite) = suite(name) {
                offered.extend(Some(suite).filter(|suite| !offered.contains(suite)));
            } else if SUITES_NOT_OFFERED.contains(&name) {
                parameters.not_honoured(&place, &format!("{name} is not offered"));
            } else {
                let reason = format!("unknown cipher suite {name:?}: must be one of {}", suites());
                return Err(parameters.refuse(&place, reason));
            }
        }
    }
    if wanted.is_empty() || !bounds.allows(TlsVersion::V1_2) {
        return Ok(Vec::new());
    }
    if offered.is_empty() {
        let reason = format!("no supported cipher suite: must name one of {}", suites());
        return Err(parameters.refuse(FIELD, reason));
    }
    Ok(offered)
}

/// The suite with an OpenSSL name, or with the name of RFC 5289 or RFC 7905, which BoringSSL also accepts.
fn suite(name: &str) -> Option<CipherSuite> {
    let standard = |suite| match suite {
        CipherSuite::EcdsaAes128Gcm => "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256",
        CipherSuite::RsaAes128Gcm => "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256",
        CipherSuite::EcdsaAes256Gcm => "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384",
        CipherSuite::RsaAes256Gcm => "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384",
        CipherSuite::EcdsaChaCha20 => "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256",
        CipherSuite::RsaChaCha20 => "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256",
    };
    let mut all = CipherSuite::WORDS.into_iter();
    all.find(|(word, suite)| *word == name || standard(*suite) == name).map(|(_, suite)| suite)
}

fn suites() -> String {
    CipherSuite::WORDS.map(|(word, _)| word).join(", ")
}

fn groups(
    parameters: &mut MessageReader<'_>,
    bounds: &TlsParameters,
) -> Result<Vec<KeyExchangeGroup>, FieldError> {
    const FIELD: &str = "ecdh_curves";
    let wanted = parameters.texts(FIELD);
    let words = KeyExchangeGroup::WORDS.map(|(word, _)| word).join(", ");
    let mut offered = Vec::new();
    for (at, name) in wanted.iter().enumerate() {
        let place = format!("{FIELD}[{at}]");
        if let Some((_, group)) = KeyExchangeGroup::WORDS.iter().find(|(word, _)| word == name) {
            offered.extend(Some(*group).filter(|group| !offered.contains(group)));
        } else if GROUPS_NOT_OFFERED.contains(&name.as_str()) {
            parameters.not_honoured(&place, &format!("{name} is not offered"));
        } else {
            let reason = format!("unknown curve {name:?}: must be one of {words}");
            return Err(parameters.refuse(&place, reason));
        }
    }
    if wanted.is_empty() {
        return Ok(offered);
    }
    if offered.is_empty() {
        let reason = format!("no supported curve: must name one of {words}");
        return Err(parameters.refuse(FIELD, reason));
    }
    let is_classical = |group: &KeyExchangeGroup| KeyExchangeGroup::CLASSICAL.contains(group);
    if bounds.maximum == TlsVersion::V1_2 && !offered.iter().any(is_classical) {
        let reason = "TLS 1.2 has no hybrid groups: must name one of X25519, P-256, P-384";
        return Err(parameters.refuse(FIELD, reason));
    }
    Ok(offered)
}

/// Encodes the parameters. Both bounds are always set: without them, Envoy as a client does not offer TLS 1.3.
pub(super) fn encode(parameters: &TlsParameters) -> pb::TlsParameters {
    let TlsParameters { minimum, maximum, cipher_suites, groups } = parameters;
    pb::TlsParameters {
        tls_minimum_protocol_version: encode_version(*minimum).into(),
        tls_maximum_protocol_version: encode_version(*maximum).into(),
        cipher_suites: cipher_suites.iter().map(|suite| suite.word().to_owned()).collect(),
        ecdh_curves: groups.iter().map(|group| group.word().to_owned()).collect(),
        ..pb::TlsParameters::default()
    }
}

fn encode_version(version: TlsVersion) -> pb::tls_parameters::TlsProtocol {
    match version {
        TlsVersion::V1_2 => pb::tls_parameters::TlsProtocol::TlSv12,
        TlsVersion::V1_3 => pb::tls_parameters::TlsProtocol::TlSv13,
    }
}

#[cfg(test)]
mod tests {
    use weft_model::UpstreamTls;

    use super::super::tests::{read_yaml, refused, round_trip};
    use super::super::{Resource, ResourceKind};
    use super::*;

    const PLACE: &str = "transport_socket.typed_config.common_tls_context.tls_params";

    /// A cluster whose TLS context has these parameters.
    fn cluster(parameters: &str) -> String {
        format!(
            r#"{{name: c, type: EDS, eds_cluster_config: {{}}, transport_socket: {{name: tls, typed_config: {{
            "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext,
            common_tls_context: {{tls_params: {{{parameters}}}}}}}}}}}"#
        )
    }

    fn parameters(resource: Resource) -> TlsParameters {
        let Resource::Cluster(cluster) = resource else { panic!("a cluster") };
        cluster.tls.as_ref().map(|tls: &UpstreamTls| tls.parameters.clone()).expect("TLS")
    }

    #[track_caller]
    fn read(text: &str) -> (TlsParameters, Vec<String>) {
        let accepted = read_yaml(ResourceKind::Cluster, &cluster(text)).expect("accepted");
        (parameters(accepted.resource), accepted.notes.not_honoured)
    }

    #[test]
    fn parameters_round_trip() {
        use CipherSuite::{EcdsaChaCha20, RsaAes256Gcm};
        let written = |text: &str| parameters(round_trip(ResourceKind::Cluster, &cluster(text)));
        assert_eq!(written(""), TlsParameters::default());
        let full = written(
            "tls_minimum_protocol_version: TLSv1_2, tls_maximum_protocol_version: TLSv1_2,
             cipher_suites: [ECDHE-RSA-AES256-GCM-SHA384, ECDHE-ECDSA-CHACHA20-POLY1305],
             ecdh_curves: [P-256, X25519]",
        );
        let expected = TlsParameters {
            minimum: TlsVersion::V1_2,
            maximum: TlsVersion::V1_2,
            cipher_suites: vec![RsaAes256Gcm, EcdsaChaCha20],
            groups: vec![KeyExchangeGroup::P256, KeyExchangeGroup::X25519],
        };
        assert_eq!(full, expected);
        let meshed = written("tls_minimum_protocol_version: TLSv1_3");
        assert_eq!(meshed, TlsParameters::meshed(Vec::new()));
    }

    #[test]
    fn minimum_below_tls_1_2_is_raised_and_listed() {
        for old in ["TLSv1_0", "TLSv1_1"] {
            let (parameters, listed) = read(&format!("tls_minimum_protocol_version: {old}"));
            assert_eq!(parameters, TlsParameters::default());
            let note = format!("{old} is not supported; the minimum is TLSv1_2");
            assert_eq!(listed, [format!("{PLACE}.{MINIMUM} ({note})")]);
        }
    }

    #[test]
    fn maximum_below_tls_1_2_or_below_the_minimum_is_refused() {
        let check = |text: &str, reason: &str| {
            refused(ResourceKind::Cluster, &cluster(text), &format!("{PLACE}.{MAXIMUM}"), reason);
        };
        check("tls_maximum_protocol_version: TLSv1_0", "unsupported version TLSv1_0");
        check("tls_maximum_protocol_version: TLSv1_1", "unsupported version TLSv1_1");
        check(
            "tls_minimum_protocol_version: TLSv1_3, tls_maximum_protocol_version: TLSv1_2",
            "TLSv1_2: must not be below tls_minimum_protocol_version TLSv1_3",
        );
    }

    #[test]
    fn unsupported_suites_are_ignored_and_listed() {
        let (parameters, listed) = read(
            r#"cipher_suites: [AES128-SHA, "[ECDHE-RSA-AES128-GCM-SHA256|ECDHE-RSA-CHACHA20-POLY1305]",
                TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256]"#,
        );
        let expected = [CipherSuite::RsaAes128Gcm, CipherSuite::RsaChaCha20];
        assert_eq!(parameters.cipher_suites, expected);
        assert_eq!(listed, [format!("{PLACE}.cipher_suites[0] (AES128-SHA is not offered)")]);
        let newer = "tls_minimum_protocol_version: TLSv1_3, cipher_suites: [AES128-SHA]";
        assert_eq!(read(newer).0, TlsParameters::meshed(Vec::new()));
    }

    #[test]
    fn unknown_suites_and_lists_without_a_supported_one_are_refused() {
        let check = |text: &str, field: &str, reason: &str| {
            refused(ResourceKind::Cluster, &cluster(text), &format!("{PLACE}.{field}"), reason);
        };
        check("cipher_suites: [AES128-SHA]", "cipher_suites", "no supported cipher suite");
        for unknown in ["ALL", "!aNULL", "ECDHE-RSA-AES128-GCM-SHA999", ""] {
            let text = format!("cipher_suites: [ECDHE-RSA-AES128-GCM-SHA256, {unknown:?}]");
            check(&text, "cipher_suites[1]", "unknown cipher suite");
        }
        check("ecdh_curves: [P-521]", "ecdh_curves", "no supported curve");
        check("ecdh_curves: [X25519, P-1]", "ecdh_curves[1]", "unknown curve");
        let hybrid = "tls_maximum_protocol_version: TLSv1_2, ecdh_curves: [X25519MLKEM768]";
        check(hybrid, "ecdh_curves", "no hybrid groups");
        let (parameters, listed) = read("ecdh_curves: [P-521, P-384]");
        assert_eq!(parameters.groups, [KeyExchangeGroup::P384]);
        assert_eq!(listed, [format!("{PLACE}.ecdh_curves[0] (P-521 is not offered)")]);
    }
}
