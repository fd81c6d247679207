//! The TLS versions, cipher suites and groups that a handshake may negotiate (`tls_params` of the TLS contexts).

/// A supported version of TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TlsVersion {
    /// TLS 1.2 (RFC 5246), with extended master secret (RFC 7627) and without renegotiation.
    V1_2,
    /// TLS 1.3 (RFC 8446).
    V1_3,
}

impl TlsVersion {
    /// Every version with its name in configurations.
    pub const WORDS: [(&'static str, Self); 2] = [("TLSv1_2", Self::V1_2), ("TLSv1_3", Self::V1_3)];

    /// The name in configurations.
    #[must_use]
    pub fn word(self) -> &'static str {
        Self::WORDS.iter().find(|(_, version)| *version == self).map_or("", |(word, _)| word)
    }
}

/// A key exchange group of TLS (RFC 8446, section 4.2.7).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyExchangeGroup {
    /// Hybrid of X25519 and ML-KEM-768, which resists quantum computers.
    X25519MlKem768,
    /// Curve25519.
    X25519,
    /// NIST curve P-256.
    P256,
    /// NIST curve P-384.
    P384,
}

impl KeyExchangeGroup {
    /// Every group with its name in configurations, most preferred first.
    pub const WORDS: [(&'static str, Self); 4] = [
        ("X25519MLKEM768", Self::X25519MlKem768),
        ("X25519", Self::X25519),
        ("P-256", Self::P256),
        ("P-384", Self::P384),
    ];

    /// The groups that are not resistant to quantum computers.
    pub const CLASSICAL: [Self; 3] = [Self::X25519, Self::P256, Self::P384];

    /// The name in configurations.
    #[must_use]
    pub fn word(self) -> &'static str {
        Self::WORDS.iter().find(|(_, group)| *group == self).map_or("", |(word, _)| word)
    }
}

/// A cipher suite of TLS 1.2. All have forward secrecy and authenticated encryption. The suites of TLS 1.3 are not
/// configurable, as in Envoy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CipherSuite {
    /// `TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256`.
    EcdsaAes128Gcm,
    /// `TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256`.
    RsaAes128Gcm,
    /// `TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384`.
    EcdsaAes256Gcm,
    /// `TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384`.
    RsaAes256Gcm,
    /// `TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256`.
    EcdsaChaCha20,
    /// `TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256`.
    RsaChaCha20,
}

impl CipherSuite {
    /// Every suite with its OpenSSL name, which `cipher_suites` uses, most preferred first.
    pub const WORDS: [(&'static str, Self); 6] = [
        ("ECDHE-ECDSA-AES128-GCM-SHA256", Self::EcdsaAes128Gcm),
        ("ECDHE-RSA-AES128-GCM-SHA256", Self::RsaAes128Gcm),
        ("ECDHE-ECDSA-AES256-GCM-SHA384", Self::EcdsaAes256Gcm),
        ("ECDHE-RSA-AES256-GCM-SHA384", Self::RsaAes256Gcm),
        ("ECDHE-ECDSA-CHACHA20-POLY1305", Self::EcdsaChaCha20),
        ("ECDHE-RSA-CHACHA20-POLY1305", Self::RsaChaCha20),
    ];

    /// The OpenSSL name.
    #[must_use]
    pub fn word(self) -> &'static str {
        Self::WORDS.iter().find(|(_, suite)| *suite == self).map_or("", |(word, _)| word)
    }
}

/// What a TLS handshake may negotiate (`envoy.extensions.transport_sockets.tls.v3.TlsParameters`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsParameters {
    /// The lowest version (`tls_minimum_protocol_version`).
    pub minimum: TlsVersion,
    /// The highest version (`tls_maximum_protocol_version`), not below `minimum`.
    pub maximum: TlsVersion,
    /// The suites of TLS 1.2 (`cipher_suites`), most preferred first; empty: all supported suites.
    pub cipher_suites: Vec<CipherSuite>,
    /// The key exchange groups (`ecdh_curves`), most preferred first; empty: all, in the default order.
    pub groups: Vec<KeyExchangeGroup>,
}

impl Default for TlsParameters {
    /// TLS 1.2 and 1.3, for peers outside the mesh.
    fn default() -> Self {
        Self {
            minimum: TlsVersion::V1_2,
            maximum: TlsVersion::V1_3,
            cipher_suites: Vec::new(),
            groups: Vec::new(),
        }
    }
}

impl TlsParameters {
    /// TLS 1.3 alone, for peers inside the mesh.
    #[must_use]
    pub fn meshed(groups: Vec<KeyExchangeGroup>) -> Self {
        Self { minimum: TlsVersion::V1_3, groups, ..Self::default() }
    }

    /// Whether a handshake may negotiate this version.
    #[must_use]
    pub fn allows(&self, version: TlsVersion) -> bool {
        (self.minimum..=self.maximum).contains(&version)
    }
}
