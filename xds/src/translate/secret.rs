//! `Secret` and the TLS contexts: certificates, trust bundles, and how peers are verified.

use std::sync::Arc;

use envoy_types::util::pack_any;
use weft_model::{
    ClientCertificateMode, DataSource, DownstreamTls, Name, RevocationDepth, RevocationPolicy,
    Secret, SecretSource, StringMatch, TlsIdentity, TlsParameters, UpstreamTls, Validation,
};

use super::pb::tls::common_tls_context::{
    CombinedCertificateValidationContext, ValidationContextType,
};
use super::pb::{core, google, tls as pb};
use super::revocation::{encode_revocation_policy, revocation_policy};
use super::{FieldError, MessageReader, tls_parameters, values};

/// The name of the secret with the workload's own certificate. The workload creates it and does not request it over SDS.
pub const WORKLOAD_IDENTITY: &str = "default";

/// The static cluster for `weft sds` in an Envoy's bootstrap file: it serves [`WORKLOAD_IDENTITY`] with its key, and the
/// trust bundle and CRLs without weft's own settings.
const SDS_CLUSTER: &str = "sds";

/// The greatest accepted chain depth, which is webpki's limit.
const DEPTH_LIMIT: usize = 7;

/// Reads a secret.
pub(super) fn decode(mut secret: MessageReader<'_>) -> Result<(Name, Secret), FieldError> {
    let name: Name = secret.required_text("name")?.into();
    if let Some(certificate) = secret.child("tls_certificate") {
        return Ok((name, Secret::Identity(identity(certificate)?)));
    }
    if let Some(context) = secret.child("validation_context") {
        return Ok((name, Secret::Validation(validation(context)?)));
    }
    Err(secret.refuse("", "unsupported secret: must have tls_certificate or validation_context"))
}

fn identity(mut certificate: MessageReader<'_>) -> Result<TlsIdentity, FieldError> {
    certificate.unenforced(&["watched_directory"]);
    let chain = values::data(certificate.required_child("certificate_chain")?)?;
    let key = values::data(certificate.required_child("private_key")?)?;
    Ok(TlsIdentity { chain, key })
}

fn validation(mut context: MessageReader<'_>) -> Result<Validation, FieldError> {
    context.harmless(&["suppress_client_ca_list"]);
    let roots = roots(&mut context)?;
    let revocations = context.child("crl").map(values::data).transpose()?;
    let mut policy = RevocationPolicy::default();
    if context.flag("only_verify_leaf_cert_crl") == Some(true) {
        policy.depth = RevocationDepth::Leaf;
    }
    if let Some(depth) = context.number("max_verify_depth") {
        if depth == 0 {
            let reason = "invalid depth 0: must be 1 or more";
            return Err(context.refuse("max_verify_depth", reason));
        }
        policy.depth_limit = (depth as usize).min(DEPTH_LIMIT);
    }
    let mut points = Vec::new();
    if let Some(ours) = context.child("custom_validator_config") {
        revocation_policy(ours, &mut policy, &mut points)?;
    }
    Ok(Validation { roots, revocations, points, policy, names: names(&mut context)? })
}

fn roots(context: &mut MessageReader<'_>) -> Result<DataSource, FieldError> {
    context.unenforced(&["watched_directory"]);
    match (context.child("trusted_ca"), context.child("system_root_certs")) {
        (Some(given), None) => values::data(given),
        (None, Some(_)) => Ok(DataSource::SystemRoots),
        (Some(_), Some(_)) => {
            Err(context.refuse("system_root_certs", "must not be set together with trusted_ca"))
        }
        (None, None) => Err(context.refuse(
            "trusted_ca",
            "this field is missing: without it any certificate would be accepted",
        )),
    }
}

/// The names of which a peer's certificate must have one. Only URI and DNS names are supported.
fn names(context: &mut MessageReader<'_>) -> Result<Vec<StringMatch>, FieldError> {
    let mut typed = Vec::new();
    for mut matcher in context.children("match_typed_subject_alt_names") {
        match matcher.choice("san_type").as_str() {
            "URI" | "DNS" => typed.push(values::string_match(matcher.required_child("matcher")?)?),
            other => {
                return Err(matcher
                    .refuse("san_type", format!("unsupported type {other}: must be URI or DNS")));
            }
        }
    }
    let untyped = values::each(context.children("match_subject_alt_names"), values::string_match)?;
    // The deprecated field is used only when the typed one is not set.
    Ok(if typed.is_empty() { untyped } else { typed })
}

/// Reads the TLS settings towards clients.
pub(super) fn downstream(mut context: MessageReader<'_>) -> Result<DownstreamTls, FieldError> {
    let required = context.flag("require_client_certificate").unwrap_or(false);
    context.harmless(&[
        "disable_stateful_session_resumption",
        "disable_stateless_session_resumption",
        "session_timeout",
        "session_ticket_keys",
        // There is only one certificate, and all suites are equally strong, so these settings have no effect.
        "full_scan_certs_on_sni_mismatch",
        "prefer_client_ciphers",
    ]);
    let mut common = common(context.required_child("common_tls_context")?, false)?;
    let Some(identity) = common.identity.take() else {
        return Err(context.refuse("common_tls_context", "must have a server certificate"));
    };
    let client_certificates = match (common.validation, common.accepts_untrusted) {
        (Some(validation), _) => {
            ClientCertificateMode::Verify { validation, names: common.names, required }
        }
        (None, true) => ClientCertificateMode::PassThrough { required },
        (None, false) if required => {
            return Err(context.refuse(
                "require_client_certificate",
                "must have a validation context with trusted_ca to verify the certificate",
            ));
        }
        (None, false) => ClientCertificateMode::NotRequested,
    };
    Ok(DownstreamTls {
        identity,
        client_certificates,
        alpn: common.alpn,
        parameters: common.parameters,
    })
}

/// Reads the TLS settings towards endpoints.
pub(super) fn upstream(mut context: MessageReader<'_>) -> Result<UpstreamTls, FieldError> {
    // Renegotiation is not supported.
    context.harmless(&["max_session_keys", "enforce_rsa_key_usage", "allow_renegotiation"]);
    let sni = Some(context.text("sni")).filter(|sni| !sni.is_empty());
    let common = match context.child("common_tls_context") {
        Some(common_context) => common(common_context, true)?,
        None => CommonTls::default(),
    };
    if common.validation.is_none() {
        context.warn(
            "common_tls_context.validation_context",
            "no trusted_ca: the endpoint's certificate is not verified, any server is accepted",
        );
    }
    Ok(UpstreamTls {
        identity: common.identity,
        validation: common.validation,
        names: common.names,
        sni,
        alpn: common.alpn,
        parameters: common.parameters,
    })
}

#[derive(Default)]
struct CommonTls {
    identity: Option<SecretSource>,
    validation: Option<SecretSource>,
    /// Whether any certificate is accepted without verification.
    accepts_untrusted: bool,
    names: Vec<StringMatch>,
    alpn: Vec<String>,
    parameters: TlsParameters,
}

/// Reads `CommonTlsContext`. As in Envoy, the context for endpoints may have no trust bundle (`takes_any_server`); the
/// context for clients must set `ACCEPT_UNTRUSTED` for that.
fn common(mut context: MessageReader<'_>, takes_any_server: bool) -> Result<CommonTls, FieldError> {
    let alpn = context.texts("alpn_protocols");
    let parameters = context.child("tls_params").map(tls_parameters::decode).transpose()?;
    let parameters = parameters.unwrap_or_default();
    let mut identities = Vec::new();
    for certificate in context.children("tls_certificates") {
        identities.push(SecretSource::Inline(Arc::new(Secret::Identity(identity(certificate)?))));
    }
    for sds in context.children("tls_certificate_sds_secret_configs") {
        identities.push(named(sds)?);
    }
    if identities.len() > 1 {
        return Err(
            context.refuse("tls_certificates", "unsupported number of certificates: must be one")
        );
    }
    let mut names_here = Vec::new();
    let mut accepts_untrusted = false;
    let validation = if let Some(mut inline) = context.child("validation_context") {
        accepts_untrusted = takes_any(&mut inline, takes_any_server)?;
        (!accepts_untrusted)
            .then(|| validation(inline))
            .transpose()?
            .map(|inline| SecretSource::Inline(Arc::new(Secret::Validation(inline))))
    } else if let Some(sds) = context.child("validation_context_sds_secret_config") {
        Some(named(sds)?)
    } else if let Some(mut combined) = context.child("combined_validation_context") {
        if let Some(mut defaults) = combined.child("default_validation_context") {
            names_here = names(&mut defaults)?;
        }
        Some(named(combined.required_child("validation_context_sds_secret_config")?)?)
    } else {
        None
    };
    let identity = identities.pop();
    Ok(CommonTls { identity, validation, accepts_untrusted, names: names_here, alpn, parameters })
}

/// Whether a context accepts any certificate. A context that sets `ACCEPT_UNTRUSTED` together with conditions is refused,
/// because certificates that do not meet them would be accepted too.
fn takes_any(context: &mut MessageReader<'_>, takes_any_server: bool) -> Result<bool, FieldError> {
    const FIELD: &str = "trust_chain_verification";
    match context.choice(FIELD).as_str() {
        // Other conditions cannot be checked without a trust bundle; the caller refuses them.
        "VERIFY_TRUST_CHAIN" => Ok(takes_any_server && context.is_empty()),
        "ACCEPT_UNTRUSTED" => {
            let asks = ["trusted_ca", "system_root_certs", "crl"]
                .into_iter()
                .find(|name| context.child(name).is_some());
            let is_named = !names(context)?.is_empty();
            let asks = asks.or_else(|| is_named.then_some("names"));
            asks.map_or(Ok(true), |asked| {
                let reason = format!(
                    "ACCEPT_UNTRUSTED must not be set together with {asked}: remove {asked} to forward \
                     certificates without verification, or remove this field to verify them"
                );
                Err(context.refuse(FIELD, reason))
            })
        }
        other => Err(context.refuse(FIELD, format!("unknown value {other}"))),
    }
}

/// Reads a reference to a secret. Only Envoy uses its `sds_config`: weft's data planes create [`WORKLOAD_IDENTITY`]
/// themselves and request other secrets over ADS.
fn named(mut sds: MessageReader<'_>) -> Result<SecretSource, FieldError> {
    let name = sds.required_text("name")?;
    let source = ["sds_config", "api_config_source", "grpc_services", "envoy_grpc", "cluster_name"];
    if name == WORKLOAD_IDENTITY || sds.peek(&source).as_deref() == Some(SDS_CLUSTER) {
        sds.harmless(&["sds_config"]);
    }
    values::config_source(&mut sds, "sds_config");
    Ok(SecretSource::Named(name.into()))
}

/// Encodes a secret.
pub(super) fn encode(name: &str, secret: &Secret) -> pb::Secret {
    let content = match secret {
        Secret::Identity(identity) => pb::secret::Type::TlsCertificate(encode_identity(identity)),
        Secret::Validation(validation) => {
            pb::secret::Type::ValidationContext(encode_validation(validation))
        }
    };
    pb::Secret { name: name.into(), r#type: Some(content) }
}

fn encode_identity(identity: &TlsIdentity) -> pb::TlsCertificate {
    pb::TlsCertificate {
        certificate_chain: Some(values::encode_data(&identity.chain)),
        private_key: Some(values::encode_data(&identity.key)),
        ..pb::TlsCertificate::default()
    }
}

fn encode_validation(validation: &Validation) -> pb::CertificateValidationContext {
    let mut context = pb::CertificateValidationContext {
        crl: validation.revocations.as_ref().map(values::encode_data),
        only_verify_leaf_cert_crl: validation.policy.depth == RevocationDepth::Leaf,
        custom_validator_config: encode_revocation_policy(validation),
        ..encode_names(&validation.names)
    };
    match &validation.roots {
        DataSource::SystemRoots => {
            let roots = pb::certificate_validation_context::SystemRootCerts::default();
            context.system_root_certs = Some(roots);
        }
        roots => context.trusted_ca = Some(values::encode_data(roots)),
    }
    if validation.policy.depth_limit != RevocationPolicy::default().depth_limit {
        context.max_verify_depth = values::count(validation.policy.depth_limit);
    }
    context
}

/// A validation context that has only names.
fn encode_names(names: &[StringMatch]) -> pb::CertificateValidationContext {
    let name = |name| pb::SubjectAltNameMatcher {
        san_type: pb::subject_alt_name_matcher::SanType::Uri.into(),
        matcher: Some(values::encode_string_match(name)),
        ..pb::SubjectAltNameMatcher::default()
    };
    pb::CertificateValidationContext {
        match_typed_subject_alt_names: names.iter().map(name).collect(),
        ..pb::CertificateValidationContext::default()
    }
}

/// Encodes the TLS settings towards endpoints.
pub(super) fn encode_upstream(tls: &UpstreamTls) -> core::TransportSocket {
    let common = pb::CommonTlsContext {
        alpn_protocols: tls.alpn.clone(),
        tls_params: Some(tls_parameters::encode(&tls.parameters)),
        ..encode_common(tls.identity.as_ref(), tls.validation.as_ref(), &tls.names)
    };
    transport_socket(pack_any(pb::UpstreamTlsContext {
        sni: tls.sni.clone().unwrap_or_default(),
        common_tls_context: Some(common),
        ..pb::UpstreamTlsContext::default()
    }))
}

/// Encodes the TLS settings towards clients.
pub(super) fn encode_downstream(tls: &DownstreamTls) -> core::TransportSocket {
    let identity = Some(&tls.identity);
    let mut common = match &tls.client_certificates {
        ClientCertificateMode::NotRequested | ClientCertificateMode::PassThrough { .. } => {
            encode_common(identity, None, &[])
        }
        ClientCertificateMode::Verify { validation, names, .. } => {
            encode_common(identity, Some(validation), names)
        }
    };
    let required = match &tls.client_certificates {
        ClientCertificateMode::NotRequested => false,
        ClientCertificateMode::Verify { required, .. } => *required,
        ClientCertificateMode::PassThrough { required } => {
            let accepts =
                pb::certificate_validation_context::TrustChainVerification::AcceptUntrusted;
            let context = pb::CertificateValidationContext {
                trust_chain_verification: accepts.into(),
                ..pb::CertificateValidationContext::default()
            };
            common.validation_context_type =
                Some(ValidationContextType::ValidationContext(context));
            *required
        }
    };
    common.alpn_protocols.clone_from(&tls.alpn);
    common.tls_params = Some(tls_parameters::encode(&tls.parameters));
    transport_socket(pack_any(pb::DownstreamTlsContext {
        require_client_certificate: values::flag(required),
        common_tls_context: Some(common),
        ..pb::DownstreamTlsContext::default()
    }))
}

fn transport_socket(context: google::Any) -> core::TransportSocket {
    core::TransportSocket {
        name: "envoy.transport_sockets.tls".into(),
        config_type: Some(core::transport_socket::ConfigType::TypedConfig(context)),
    }
}

fn encode_common(
    identity: Option<&SecretSource>,
    validation: Option<&SecretSource>,
    names: &[StringMatch],
) -> pb::CommonTlsContext {
    let mut context = pb::CommonTlsContext::default();
    match identity {
        Some(SecretSource::Named(name)) => {
            context.tls_certificate_sds_secret_configs.push(encode_sds(name));
        }
        Some(SecretSource::Inline(secret)) => {
            if let Secret::Identity(identity) = secret.as_ref() {
                context.tls_certificates.push(encode_identity(identity));
            }
        }
        None => {}
    }
    match validation {
        Some(SecretSource::Named(name)) => {
            let combined = CombinedCertificateValidationContext {
                default_validation_context: Some(encode_names(names)),
                validation_context_sds_secret_config: Some(encode_sds(name)),
                ..CombinedCertificateValidationContext::default()
            };
            context.validation_context_type =
                Some(ValidationContextType::CombinedValidationContext(combined));
        }
        Some(SecretSource::Inline(secret)) => {
            if let Secret::Validation(validation) = secret.as_ref() {
                let inline = encode_validation(validation);
                context.validation_context_type =
                    Some(ValidationContextType::ValidationContext(inline));
            }
        }
        None => {}
    }
    context
}

/// A reference to a secret, from a cluster that only Envoys have.
fn encode_sds(name: &str) -> pb::SdsSecretConfig {
    let grpc = core::grpc_service::EnvoyGrpc {
        cluster_name: SDS_CLUSTER.into(),
        ..core::grpc_service::EnvoyGrpc::default()
    };
    let service = core::GrpcService {
        target_specifier: Some(core::grpc_service::TargetSpecifier::EnvoyGrpc(grpc)),
        ..core::GrpcService::default()
    };
    let api = core::ApiConfigSource {
        api_type: core::api_config_source::ApiType::Grpc.into(),
        transport_api_version: core::ApiVersion::V3.into(),
        grpc_services: vec![service],
        ..core::ApiConfigSource::default()
    };
    let source = core::ConfigSource {
        resource_api_version: core::ApiVersion::V3.into(),
        config_source_specifier: Some(core::config_source::ConfigSourceSpecifier::ApiConfigSource(
            api,
        )),
        ..core::ConfigSource::default()
    };
    pb::SdsSecretConfig { name: name.into(), sds_config: Some(source) }
}
