//! TLS versions, cipher suites and key exchange groups for rustls.

use std::sync::{Arc, LazyLock};

use rustls::crypto::aws_lc_rs::{self, cipher_suite, kx_group};
use rustls::crypto::{CryptoProvider, SupportedKxGroup};
use rustls::{SupportedCipherSuite, SupportedProtocolVersion};
use weft_model::{CipherSuite, KeyExchangeGroup, TlsParameters, TlsVersion};

/// The protocol versions that the parameters allow.
pub(crate) fn versions(parameters: &TlsParameters) -> Vec<&'static SupportedProtocolVersion> {
    let version = |version| match version {
        TlsVersion::V1_2 => &rustls::version::TLS12,
        TlsVersion::V1_3 => &rustls::version::TLS13,
    };
    let all = [TlsVersion::V1_3, TlsVersion::V1_2].into_iter();
    all.filter(|version| parameters.allows(*version)).map(version).collect()
}

/// All cipher suites and groups. AES-128-GCM suites come first, because they are secure and the fastest; the order of
/// the others is that of the library. X25519MLKEM768 is the first group.
pub(crate) static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
    let mut provider = aws_lc_rs::default_provider();
    let preferred = [
        cipher_suite::TLS13_AES_128_GCM_SHA256,
        cipher_suite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
        cipher_suite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
    ];
    provider.cipher_suites.sort_by_key(|suite| !preferred.contains(suite));
    Arc::new(provider)
});

/// The suites and groups of [`PROVIDER`], or those that the parameters name, in that order.
pub(crate) fn provider(parameters: &TlsParameters) -> Arc<CryptoProvider> {
    if parameters.groups.is_empty() && parameters.cipher_suites.is_empty() {
        return PROVIDER.clone();
    }
    let mut provider = CryptoProvider::clone(&PROVIDER);
    if !parameters.groups.is_empty() {
        provider.kx_groups = parameters.groups.iter().map(|group| key_exchange(*group)).collect();
    }
    if !parameters.cipher_suites.is_empty() {
        // The parameters have no TLS 1.3 suites.
        provider.cipher_suites.retain(|suite| suite.tls13().is_some());
        let named = parameters.cipher_suites.iter().map(|suite| supported_suite(*suite));
        provider.cipher_suites.extend(named);
    }
    Arc::new(provider)
}

fn key_exchange(group: KeyExchangeGroup) -> &'static dyn SupportedKxGroup {
    match group {
        KeyExchangeGroup::X25519MlKem768 => kx_group::X25519MLKEM768,
        KeyExchangeGroup::X25519 => kx_group::X25519,
        KeyExchangeGroup::P256 => kx_group::SECP256R1,
        KeyExchangeGroup::P384 => kx_group::SECP384R1,
    }
}

fn supported_suite(suite: CipherSuite) -> SupportedCipherSuite {
    match suite {
        CipherSuite::EcdsaAes128Gcm => cipher_suite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
        CipherSuite::RsaAes128Gcm => cipher_suite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
        CipherSuite::EcdsaAes256Gcm => cipher_suite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
        CipherSuite::RsaAes256Gcm => cipher_suite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
        CipherSuite::EcdsaChaCha20 => cipher_suite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
        CipherSuite::RsaChaCha20 => cipher_suite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
    }
}
