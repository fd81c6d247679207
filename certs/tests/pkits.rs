//! The verification of clients, tested with NIST PKITS: certificates, CRLs and expected results.
//!
//! The suite has no keys for TLS 1.3, so each chain goes to `tls::check_client`, the verification of a handshake
//! without the handshake (`limbo_handshakes.rs` tests that both are the same). The data is in the Python package
//! `cryptography-vectors`, which `integration/setup` installs. The name of each end certificate contains the expected
//! result; `pkits-exceptions.txt` lists the valid certificates that weft rejects, and the reasons. Every invalid
//! certificate must be rejected.
//!
//! A chain that is rejected for its path does not test CRLs, and the reverse. Therefore each chain is also verified
//! without CRLs, and if only the CRLs forbid it, the reason is compared.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test panics on an unexpected result and prints skipped parts"
)]

mod exceptions;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use exceptions::{Exceptions, Outcome, Verdict};
use rustls_pki_types::{CertificateDer, UnixTime};
use weft_certs::{TrustParts, TrustStore, tls};
use weft_model::{RevocationMode, RevocationPolicy};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::prelude::FromDer;
use x509_parser::revocation_list::CertificateRevocationList;
use x509_parser::x509::X509Name;

/// The number of tests with an expected result in their name.
const TESTS: usize = 203;

/// 2011-04-15, 12:00 UTC: the day of this edition of the suite.
fn now() -> UnixTime {
    UnixTime::since_unix_epoch(Duration::from_secs(1_302_868_800))
}

/// A certificate or CRL of the suite.
struct File {
    /// The file name without its suffix.
    name: String,
    der: Vec<u8>,
    issuer: String,
    /// The fields of a certificate; none for a CRL.
    subject: Option<String>,
    /// The CRL issuers that a certificate names.
    list_issuers: Vec<String>,
}

struct Suite {
    anchor: File,
    authorities: Vec<File>,
    /// The last certificates of the tests, by name.
    leaves: Vec<File>,
    lists: Vec<File>,
}

/// A normalized name: names that are equal by RFC 5280, section 7.1, are equal. The pairing of certificates in this
/// test does not depend on weft's comparison.
fn folded(name: &X509Name<'_>) -> String {
    let text = name.to_string().to_lowercase();
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

impl File {
    fn certificate(path: &Path) -> Self {
        let der = std::fs::read(path).unwrap();
        let (_, certificate) = X509Certificate::from_der(&der).unwrap();
        Self {
            name: stem(path),
            issuer: folded(certificate.issuer()),
            subject: Some(folded(certificate.subject())),
            list_issuers: list_issuers(&certificate),
            der,
        }
    }

    fn list(path: &Path) -> Self {
        let der = std::fs::read(path).unwrap();
        let (_, list) = CertificateRevocationList::from_der(&der).unwrap();
        let issuer = folded(list.issuer());
        Self { name: stem(path), issuer, subject: None, list_issuers: Vec::new(), der }
    }

    fn pem(&self) -> String {
        let label = if self.subject.is_some() { "CERTIFICATE" } else { "X509 CRL" };
        pem::encode(&pem::Pem::new(label, self.der.as_slice()))
    }
}

fn list_issuers(certificate: &X509Certificate<'_>) -> Vec<String> {
    let mut found = Vec::new();
    for extension in certificate.extensions() {
        if let ParsedExtension::CRLDistributionPoints(points) = extension.parsed_extension() {
            let names = points.iter().filter_map(|point| point.crl_issuer.as_ref()).flatten();
            found.extend(names.filter_map(|name| match name {
                GeneralName::DirectoryName(name) => Some(folded(name)),
                _ => None,
            }));
        }
    }
    found
}

fn stem(path: &Path) -> String {
    path.file_stem().unwrap().to_str().unwrap().to_owned()
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut files: Vec<_> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

/// The folder of the data; none if it is missing, which the test prints.
fn data() -> Option<PathBuf> {
    let test = std::env::current_exe().unwrap();
    let target = test.ancestors().nth(3).unwrap();
    let library = target.join("venv/lib");
    let versions = std::fs::read_dir(&library).into_iter().flatten();
    let within = "site-packages/cryptography_vectors/x509/PKITS_data";
    let found = versions.map(|version| version.unwrap().path().join(within)).find(|p| p.exists());
    if found.is_none() {
        eprintln!("skipped: cryptography_vectors not found in {}", library.display());
    }
    found
}

impl Suite {
    fn read() -> Option<Self> {
        let folder = data()?;
        let mut anchor = None;
        let mut authorities = Vec::new();
        let mut leaves = Vec::new();
        for path in files(&folder.join("certs")) {
            let file = File::certificate(&path);
            if file.name == "TrustAnchorRootCertificate" {
                anchor = Some(file);
            } else if file.name.ends_with("EE") {
                leaves.push(file);
            } else {
                authorities.push(file);
            }
        }
        let lists = files(&folder.join("crls")).iter().map(|path| File::list(path)).collect();
        Some(Self { anchor: anchor.unwrap(), authorities, leaves, lists })
    }

    /// All certificates that may be between the anchor and the leaf, found by issuer name.
    fn above(&self, leaf: &File) -> Vec<&File> {
        let mut wanted: BTreeSet<&str> = BTreeSet::from([leaf.issuer.as_str()]);
        wanted.extend(leaf.list_issuers.iter().map(String::as_str));
        let anchor = self.anchor.subject.as_deref().unwrap();
        loop {
            let is_wanted = |file: &&File| {
                let subject = file.subject.as_deref().unwrap();
                subject != anchor && wanted.contains(subject)
            };
            let found: Vec<_> = self.authorities.iter().filter(is_wanted).collect();
            let before = wanted.len();
            for file in &found {
                wanted.insert(&file.issuer);
                wanted.extend(file.list_issuers.iter().map(String::as_str));
            }
            if wanted.len() == before {
                return found;
            }
        }
    }

    /// The CRLs of the anchor and of all these CAs, and CRLs with the file name of one of these, whatever their
    /// issuer.
    fn crls_of(&self, leaf: &File, above: &[&File]) -> Vec<&File> {
        let names = || std::iter::once(&self.anchor).chain(above.iter().copied());
        let is_theirs = |list: &&File| {
            let named = list.name.strip_suffix("CRL").unwrap_or(&list.name);
            names().any(|file| {
                file.subject.as_ref() == Some(&list.issuer)
                    || file.name.strip_suffix("Cert").unwrap_or(&file.name) == named
            }) || leaf.list_issuers.contains(&list.issuer)
        };
        self.lists.iter().filter(is_theirs).collect()
    }

    fn check(&self, leaf: &File, judging: Judging) -> Result<(), String> {
        let above = self.above(leaf);
        // The certificates are in the same file as the CRLs, so the CRLs of intermediates can be verified.
        let lists = self.crls_of(leaf, &above);
        let lists: String = lists.iter().chain(&above).map(|file| file.pem()).collect();
        let lists = (judging == Judging::Lists).then_some(lists);
        self.check_by(leaf, lists.as_deref(), RevocationPolicy::default())
    }

    fn check_by(
        &self,
        leaf: &File,
        lists: Option<&str>,
        policy: RevocationPolicy,
    ) -> Result<(), String> {
        let roots = self.anchor.pem();
        let revocations = lists.map(str::as_bytes);
        let parts = TrustParts { roots: roots.as_bytes(), revocations, names: Vec::new(), policy };
        // CRLs that are rejected on load reject every client.
        let trust = TrustStore::build(parts, None, now()).map_err(|error| error.to_string())?;
        let chain: Vec<_> = std::iter::once(leaf)
            .chain(self.above(leaf))
            .map(|file| CertificateDer::from(file.der.as_slice()))
            .collect();
        tls::check_client(Arc::new(trust), &chain, now()).map_err(|error| format!("{error:?}"))
    }

    /// The results of all tests with an expected result in their name.
    fn outcomes(&self, judging: Judging) -> Vec<Outcome> {
        let mut outcomes = Vec::new();
        for leaf in &self.leaves {
            let name = leaf.name.strip_suffix("EE").unwrap();
            let path_is_good = LISTS.iter().any(|(test, _)| *test == name);
            let wanted = match name {
                valid if valid.starts_with("Valid") => Verdict::Accepted,
                _ if judging == Judging::Path && path_is_good => Verdict::Accepted,
                invalid if invalid.starts_with("Invalid") => Verdict::Refused,
                // The expected result depends on the policies that the user selects.
                _ => continue,
            };
            let id = format!("{}/{name}", judging.name());
            outcomes.push(Outcome::new(id, wanted, self.check(leaf, judging)));
        }
        outcomes
    }

    fn leaf(&self, name: &str) -> &File {
        self.leaves.iter().find(|leaf| leaf.name == format!("{name}EE")).unwrap()
    }
}

/// How a chain is verified.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Judging {
    /// By the path only, so CRL faults cannot hide path faults.
    Path,
    /// By the path and the CRLs in strict mode.
    Lists,
}

impl Judging {
    fn name(self) -> &'static str {
        match self {
            Self::Path => "path",
            Self::Lists => "lists",
        }
    }
}

/// The tests with a valid path that CRLs forbid, with a part of the expected reason.
const LISTS: &[(&str, &str)] = &[
    ("InvalidBadCRLIssuerNameTest5", "no CRL covers the certificate"),
    ("InvalidBadCRLSignatureTest4", "no CRL covers the certificate"),
    ("InvalidBasicSelfIssuedCRLSigningKeyTest7", "issuer is not a CA"),
    ("InvalidBasicSelfIssuedNewWithOldTest5", "Revoked"),
    ("InvalidBasicSelfIssuedOldWithNewTest2", "Revoked"),
    ("InvalidIDPwithindirectCRLTest23", "indirect CRLs are not supported"),
    ("InvalidIDPwithindirectCRLTest26", "no CRL covers the certificate"),
    ("InvalidLongSerialNumberTest18", "Revoked"),
    ("InvalidMissingCRLTest1", "no CRL covers the certificate"),
    ("InvalidNegativeSerialNumberTest15", "Revoked"),
    ("InvalidOldCRLnextUpdateTest11", "CRL has expired"),
    ("InvalidRevokedCATest2", "Revoked"),
    ("InvalidRevokedEETest3", "Revoked"),
    ("InvalidSeparateCertificateandCRLKeysTest20", "issuer is not a CA"),
    ("InvalidSeparateCertificateandCRLKeysTest21", "issuer is not a CA"),
    ("InvalidUnknownCRLEntryExtensionTest8", "unsupported critical extension"),
    ("InvalidUnknownCRLExtensionTest10", "unsupported critical extension"),
    ("InvalidUnknownCRLExtensionTest9", "unsupported critical extension"),
    ("InvalidWrongCRLTest6", "no CRL covers the certificate"),
    ("InvalidcRLIssuerTest27", "no CRL covers the certificate"),
    ("InvalidcRLIssuerTest31", "indirect CRLs are not supported"),
    ("InvalidcRLIssuerTest32", "indirect CRLs are not supported"),
    ("InvalidcRLIssuerTest34", "indirect CRLs are not supported"),
    ("InvalidcRLIssuerTest35", "indirect CRLs are not supported"),
    ("InvaliddeltaCRLIndicatorNoBaseTest1", "delta CRL without its base CRL: number 1"),
    ("InvaliddeltaCRLTest10", "delta CRL without its base CRL: number 2"),
    ("InvaliddeltaCRLTest3", "Revoked"),
    ("InvaliddeltaCRLTest4", "Revoked"),
    ("InvaliddeltaCRLTest6", "Revoked"),
    ("InvaliddeltaCRLTest9", "Revoked"),
    ("InvaliddistributionPointTest2", "Revoked"),
    ("InvaliddistributionPointTest3", "no CRL covers the certificate"),
    ("InvaliddistributionPointTest6", "no full name"),
    ("InvaliddistributionPointTest8", "no full name"),
    ("InvaliddistributionPointTest9", "no full name"),
    ("InvalidkeyUsageCriticalcRLSignFalseTest4", "does not allow CRL signing"),
    ("InvalidkeyUsageNotCriticalcRLSignFalseTest5", "does not allow CRL signing"),
    ("InvalidonlyContainsAttributeCertsTest14", "distribution point"),
    ("InvalidonlyContainsCACertsTest12", "no CRL covers the certificate"),
    ("InvalidonlySomeReasonsTest15", "for some reasons only"),
    ("InvalidonlySomeReasonsTest16", "for some reasons only"),
    ("InvalidonlySomeReasonsTest17", "for some reasons only"),
    ("InvalidonlySomeReasonsTest20", "for some reasons only"),
    ("InvalidonlySomeReasonsTest21", "for some reasons only"),
    ("Invalidpre2000CRLnextUpdateTest12", "CRL has expired"),
];

/// The valid chains that weft rejects.
fn exceptions() -> Exceptions {
    let file = include_str!("pkits-exceptions.txt");
    assert!(!file.contains("| accepted |"), "exceptions may only reject");
    Exceptions::read(file)
}

#[test]
fn pkits_paths_have_the_expected_result() {
    let Some(suite) = Suite::read() else { return };
    let outcomes = suite.outcomes(Judging::Path);
    assert_eq!(outcomes.len(), TESTS);
    exceptions().hold(&outcomes);
}

#[test]
fn pkits_paths_with_crls_have_the_expected_result() {
    let Some(suite) = Suite::read() else { return };
    let outcomes = suite.outcomes(Judging::Lists);
    assert_eq!(outcomes.len(), TESTS);
    exceptions().hold(&outcomes);
}

#[test]
fn pkits_crl_rejections_have_the_expected_reason() {
    let Some(suite) = Suite::read() else { return };
    for (test, reason) in LISTS {
        let cause = suite.check(suite.leaf(test), Judging::Lists).unwrap_err();
        assert!(cause.contains(reason), "{test}: {cause:?} does not contain {reason:?}");
    }
}

/// 4.4.2: the CRL of the revoked CA itself is not accepted, since no root signed its issuer. Without it, a soft
/// policy accepts the leaf, but must reject the revoked CA.
#[test]
fn pkits_leaf_below_a_revoked_ca_is_rejected() {
    let Some(suite) = Suite::read() else { return };
    let leaf = suite.leaf("InvalidRevokedCATest2");
    let soft = RevocationPolicy { mode: RevocationMode::Soft, ..RevocationPolicy::default() };
    let check = |names: &[&str]| {
        let lists = suite.lists.iter().filter(|list| names.contains(&list.name.as_str()));
        let lists: String = lists.chain(suite.above(leaf)).map(File::pem).collect();
        suite.check_by(leaf, Some(&lists), soft)
    };
    assert_eq!(check(&["TrustAnchorRootCRL"]), Ok(()));
    let refused = check(&["TrustAnchorRootCRL", "GoodCACRL"]);
    assert_eq!(refused, Err("InvalidCertificate(Revoked)".into()));
}
