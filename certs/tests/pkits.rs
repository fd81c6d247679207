//! Our check of clients held against NIST's PKITS: its certificates, its revocation lists, its verdicts.
//!
//! The suite has no keys for TLS 1.3, so each chain goes to `tls::check_client`, the check of a handshake without
//! the handshake (`limbo_handshakes.rs` shows that they are one). The data comes with the Python package
//! `cryptography-vectors`, by `integration/setup`. The verdict stands in the name of each last certificate;
//! `pkits-exceptions.txt` lists the valid ones that we refuse, and why. No invalid one may be let in.
//!
//! A refusal alone shows little: a chain that is refused for its path says nothing of lists, and the reverse. So
//! each is judged by its path alone too, and where lists alone are at fault, the reason is compared.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stderr,
    reason = "a test stops at what it did not expect, and says what it left out"
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

/// How many tests have a verdict in their name.
const TESTS: usize = 203;

/// 2011-04-15, 12:00 UTC: the day of this edition of the suite.
fn now() -> UnixTime {
    UnixTime::since_unix_epoch(Duration::from_secs(1_302_868_800))
}

/// A certificate or list of the suite.
struct File {
    /// Without its suffix.
    name: String,
    der: Vec<u8>,
    issuer: String,
    /// A certificate's; none for a list.
    subject: Option<String>,
    /// Whom a certificate names as issuers of its lists.
    list_issuers: Vec<String>,
}

struct Suite {
    anchor: File,
    authorities: Vec<File>,
    /// The last certificates of the tests, by name.
    leaves: Vec<File>,
    lists: Vec<File>,
}

/// A name such that those that RFC 5280, section 7.1, calls equal are equal: the suite's own pairing of
/// certificates does not depend on how we compare names.
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

/// The folder of the data; none when it is not there, which the test then says.
fn data() -> Option<PathBuf> {
    let test = std::env::current_exe().unwrap();
    let target = test.ancestors().nth(3).unwrap();
    let library = target.join("venv/lib");
    let versions = std::fs::read_dir(&library).into_iter().flatten();
    let within = "site-packages/cryptography_vectors/x509/PKITS_data";
    let found = versions.map(|version| version.unwrap().path().join(within)).find(|p| p.exists());
    if found.is_none() {
        eprintln!("skipped: there is no cryptography_vectors in {}", library.display());
    }
    found
}

impl Suite {
    fn read() -> Option<Self> {
        let folder = data()?;
        let (mut anchor, mut authorities, mut leaves) = (None, Vec::new(), Vec::new());
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

    /// All certificates that may stand between the anchor and the leaf: those that an issuer's name leads to.
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

    /// The lists of the anchor and of all these, and those that bear the file name of one of these, whosever
    /// they are.
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
        // The certificates stand beside the lists, so that the lists of intermediates count.
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
        let (roots, revocations) = (self.anchor.pem(), lists.map(str::as_bytes));
        let parts = TrustParts { roots: roots.as_bytes(), revocations, names: Vec::new(), policy };
        // Lists that are refused when they come let nobody in.
        let trust = TrustStore::build(parts, None, now()).map_err(|error| error.to_string())?;
        let chain: Vec<_> = std::iter::once(leaf)
            .chain(self.above(leaf))
            .map(|file| CertificateDer::from(file.der.as_slice()))
            .collect();
        tls::check_client(Arc::new(trust), &chain, now()).map_err(|error| format!("{error:?}"))
    }

    /// What becomes of each test whose name holds a verdict.
    fn outcomes(&self, judging: Judging) -> Vec<Outcome> {
        let mut outcomes = Vec::new();
        for leaf in &self.leaves {
            let name = leaf.name.strip_suffix("EE").unwrap();
            let path_is_good = LISTS.iter().any(|(test, _)| *test == name);
            let wanted = match name {
                valid if valid.starts_with("Valid") => Verdict::Accepted,
                _ if judging == Judging::Path && path_is_good => Verdict::Accepted,
                invalid if invalid.starts_with("Invalid") => Verdict::Refused,
                // The verdict depends on the policies that the user asks for.
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

/// By what a chain is judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Judging {
    /// By the path alone: so that what is wrong with it is not hidden by what is wrong with lists.
    Path,
    /// By the path and by the lists, strictly.
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

/// The tests whose path is good and whose lists forbid them, with a part of our reason.
const LISTS: &[(&str, &str)] = &[
    ("InvalidBadCRLIssuerNameTest5", "no revocation list speaks of it"),
    ("InvalidBadCRLSignatureTest4", "no revocation list speaks of it"),
    ("InvalidBasicSelfIssuedCRLSigningKeyTest7", "its issuer is no authority"),
    ("InvalidBasicSelfIssuedNewWithOldTest5", "Revoked"),
    ("InvalidBasicSelfIssuedOldWithNewTest2", "Revoked"),
    ("InvalidIDPwithindirectCRLTest23", "indirect lists are not supported"),
    ("InvalidIDPwithindirectCRLTest26", "no revocation list speaks of it"),
    ("InvalidLongSerialNumberTest18", "Revoked"),
    ("InvalidMissingCRLTest1", "no revocation list speaks of it"),
    ("InvalidNegativeSerialNumberTest15", "Revoked"),
    ("InvalidOldCRLnextUpdateTest11", "its revocation list has expired"),
    ("InvalidRevokedCATest2", "Revoked"),
    ("InvalidRevokedEETest3", "Revoked"),
    ("InvalidSeparateCertificateandCRLKeysTest20", "its issuer is no authority"),
    ("InvalidSeparateCertificateandCRLKeysTest21", "its issuer is no authority"),
    ("InvalidUnknownCRLEntryExtensionTest8", "a critical extension"),
    ("InvalidUnknownCRLExtensionTest10", "a critical extension"),
    ("InvalidUnknownCRLExtensionTest9", "a critical extension"),
    ("InvalidWrongCRLTest6", "no revocation list speaks of it"),
    ("InvalidcRLIssuerTest27", "no revocation list speaks of it"),
    ("InvalidcRLIssuerTest31", "indirect lists are not supported"),
    ("InvalidcRLIssuerTest32", "indirect lists are not supported"),
    ("InvalidcRLIssuerTest34", "indirect lists are not supported"),
    ("InvalidcRLIssuerTest35", "indirect lists are not supported"),
    ("InvaliddeltaCRLIndicatorNoBaseTest1", "it changes list number 1"),
    ("InvaliddeltaCRLTest10", "it changes list number 2"),
    ("InvaliddeltaCRLTest3", "Revoked"),
    ("InvaliddeltaCRLTest4", "Revoked"),
    ("InvaliddeltaCRLTest6", "Revoked"),
    ("InvaliddeltaCRLTest9", "Revoked"),
    ("InvaliddistributionPointTest2", "Revoked"),
    ("InvaliddistributionPointTest3", "no revocation list speaks of it"),
    ("InvaliddistributionPointTest6", "no full name"),
    ("InvaliddistributionPointTest8", "no full name"),
    ("InvaliddistributionPointTest9", "no full name"),
    ("InvalidkeyUsageCriticalcRLSignFalseTest4", "not for signing lists"),
    ("InvalidkeyUsageNotCriticalcRLSignFalseTest5", "not for signing lists"),
    ("InvalidonlyContainsAttributeCertsTest14", "its distribution point"),
    ("InvalidonlyContainsCACertsTest12", "no revocation list speaks of it"),
    ("InvalidonlySomeReasonsTest15", "for some reasons only"),
    ("InvalidonlySomeReasonsTest16", "for some reasons only"),
    ("InvalidonlySomeReasonsTest17", "for some reasons only"),
    ("InvalidonlySomeReasonsTest20", "for some reasons only"),
    ("InvalidonlySomeReasonsTest21", "for some reasons only"),
    ("Invalidpre2000CRLnextUpdateTest12", "its revocation list has expired"),
];

/// What is refused here and need not be.
fn exceptions() -> Exceptions {
    let file = include_str!("pkits-exceptions.txt");
    assert!(!file.contains("| accepted |"), "no acceptance is argued away");
    Exceptions::read(file)
}

#[test]
fn a_path_of_pkits_is_judged_as_expected() {
    let Some(suite) = Suite::read() else { return };
    let outcomes = suite.outcomes(Judging::Path);
    assert_eq!(outcomes.len(), TESTS);
    exceptions().hold(&outcomes);
}

#[test]
fn a_path_of_pkits_with_its_lists_is_judged_as_expected() {
    let Some(suite) = Suite::read() else { return };
    let outcomes = suite.outcomes(Judging::Lists);
    assert_eq!(outcomes.len(), TESTS);
    exceptions().hold(&outcomes);
}

#[test]
fn what_the_lists_of_pkits_forbid_is_refused_for_its_reason() {
    let Some(suite) = Suite::read() else { return };
    for (test, reason) in LISTS {
        let cause = suite.check(suite.leaf(test), Judging::Lists).unwrap_err();
        assert!(cause.contains(reason), "{test}: {cause:?} does not say {reason:?}");
    }
}

/// 4.4.2: the list of the revoked authority itself is none that we take, since a root did not sign its issuer;
/// without it, an indulgent policy lets the leaf pass, and the authority must not.
#[test]
fn an_authority_of_pkits_that_is_revoked_lets_nobody_in() {
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
