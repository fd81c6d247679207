//! How a sidecar handles each kind of CRL: which clients it admits, and which CRL files it rejects.
//!
//! Each case runs twice: on a listener that has never had a good CRL, and on one that has.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rcgen::KeyUsagePurpose;
use rustls::AlertDescription;
use rustls_pki_types::UnixTime;
use serde_json::{Value, json};
use tempfile::TempDir;
use weft_certs::TrustStore;
use weft_certs::tls::{ClientTls, LoadedIdentity};
use weft_integration::authority::PemIdentity;
use weft_integration::bootstrap::{UpstreamHttp, bootstrap, cluster, http, listener, route_to};
use weft_integration::crafted_pki::{
    CraftedCa, CraftedCrl, ExtensionCriticality, HOUR, URI, authority_params, crl_pem, der,
    distribution_point, extension, integer, intermediate, leaf, leaf_params, names, point, root,
};
use weft_integration::curl::Curl;
use weft_integration::mesh_pki::{IdentityFiles as Files, MeshPki, spiffe_id};
use weft_integration::origin_server::OriginServer;
use weft_integration::port;
use weft_integration::sidecar_pair::{SidecarLaunch, TestSidecar};
use weft_integration::tls_client::{TlsClient, client_config_trusting};
use weft_integration::tls_contexts::verify_mode;
use weft_integration::wait::eventually;

/// The client that connects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Caller {
    /// Issued by the intermediate; no CRL lists it.
    Good,
    /// Issued by the intermediate; CRLs that revoke anything list it.
    Bad,
    /// Issued by the intermediate, with the CRL distribution point `POINT` in its certificate.
    WithPoint,
    /// Issued by a second intermediate, which the root's CRL revokes in one case.
    OfSecondIntermediate,
    /// Issued by an intermediate whose key usage does not allow CRL signing.
    OfNonCrlSigner,
    /// Issued by the root itself.
    OfRoot,
    /// Issued by the root itself; the root's CRL lists it in one case.
    OfRootBad,
}

const GOOD: u64 = 1000;
const BAD: u64 = 1001;
const OF_ROOT_BAD: u64 = 1006;
const ISSUING: u64 = 50;
const SECOND: u64 = 51;
const NON_CRL_SIGNER: u64 = 52;

const POINT: &str = "http://lists.mesh.local/here";
const OTHER_POINT: &str = "http://lists.mesh.local/elsewhere";

/// Last arc of the object identifiers of CRL extensions (`id-ce`, 2.5.29, RFC 5280 section 5).
const DELTA_INDICATOR: u8 = 27;
const DISTRIBUTION_POINT: u8 = 28;
const CERTIFICATE_ISSUER: u8 = 29;
const UNKNOWN_EXTENSION: u8 = 127;

/// Every CA and every certificate of the cases.
struct Pki {
    root: CraftedCa,
    /// The intermediate that issues most certificates.
    issuing: CraftedCa,
    second: CraftedCa,
    /// An intermediate whose key usage does not allow CRL signing.
    non_crl_signer: CraftedCa,
    /// A root that is not trusted.
    untrusted: CraftedCa,
    /// An intermediate of the untrusted root, with the same name as `issuing`.
    namesake: CraftedCa,
    callers: BTreeMap<Caller, PemIdentity>,
    server: PemIdentity,
}

impl Pki {
    fn new() -> Self {
        let root = root(authority_params("root", 1));
        let issuing = intermediate(authority_params("below", ISSUING), &root);
        let second = intermediate(authority_params("cousin", SECOND), &root);
        let mut params = authority_params("mute", NON_CRL_SIGNER);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let non_crl_signer = intermediate(params, &root);
        let untrusted = weft_integration::crafted_pki::root(authority_params("stranger", 1));
        let namesake = intermediate(authority_params("below", ISSUING), &untrusted);
        let params = |service: &str, serial| {
            let mut params = leaf_params(Some(service), serial);
            params.custom_extensions.push(names(&[(URI, spiffe_id(service).as_bytes())]));
            params
        };
        let mut with_point = params("pointed", 1002);
        with_point.custom_extensions.push(distribution_point(POINT));
        let of_second = params("cousin", 1003);
        let of_non_crl_signer = params("mute", 1004);
        let callers = BTreeMap::from([
            (Caller::Good, leaf(&params("good", GOOD), &issuing, &[&issuing])),
            (Caller::Bad, leaf(&params("bad", BAD), &issuing, &[&issuing])),
            (Caller::WithPoint, leaf(&with_point, &issuing, &[&issuing])),
            (Caller::OfSecondIntermediate, leaf(&of_second, &second, &[&second])),
            (Caller::OfNonCrlSigner, leaf(&of_non_crl_signer, &non_crl_signer, &[&non_crl_signer])),
            (Caller::OfRoot, leaf(&params("direct", 1005), &root, &[])),
            (Caller::OfRootBad, leaf(&params("direct", OF_ROOT_BAD), &root, &[])),
        ]);
        let server = leaf(&params("server", 1007), &issuing, &[&issuing]);
        Self { root, issuing, second, non_crl_signer, untrusted, namesake, callers, server }
    }

    /// A PEM file of these CRLs, with the certificates of the intermediates that may have signed them.
    fn crl_file(&self, crls: &[Vec<u8>]) -> Vec<u8> {
        let crls: String = crls.iter().map(|crl| crl_pem(crl)).collect();
        let intermediates =
            [&self.issuing, &self.second, &self.non_crl_signer].map(|ca| ca.pem()).concat();
        (crls + &intermediates).into_bytes()
    }

    /// A CRL file with this CRL, signed by the issuing intermediate, and an empty CRL of the root.
    fn with_clean_root(&self, number: u64, crl: &CraftedCrl) -> Vec<u8> {
        self.crl_file(&[crl.signed_by(&self.issuing), self.clean_root(number)])
    }

    fn clean_root(&self, number: u64) -> Vec<u8> {
        CraftedCrl::new(number, &[]).signed_by(&self.root)
    }

    fn holder(&self, caller: Caller) -> &PemIdentity {
        self.callers.get(&caller).expect("every caller has a certificate")
    }

    /// Connects and sends a request.
    ///
    /// # Errors
    ///
    /// The TLS alert, if there was one, with which the sidecar refused the client.
    fn call(&self, caller: Caller, port: u16) -> Result<(), Option<AlertDescription>> {
        let config =
            client_config_trusting(&self.root.pem(), self.holder(caller), "server", "http/1.1");
        let mut connection = TlsClient::connect(port, &config);
        connection.handshake_result()?;
        assert_eq!(connection.ask("/"), Some(200), "{caller:?} is served after the handshake");
        Ok(())
    }
}

/// The expected handling of a CRL file.
#[derive(Clone, Copy)]
enum Expected {
    /// The file is loaded, and these callers are admitted or refused.
    Loaded(&'static [(Caller, Result<(), Option<AlertDescription>>)]),
    /// The file is rejected, for a reason that contains this text.
    Rejected(&'static str),
    /// The intermediate's CRL applies to no certificate, for a reason that contains this text; the root's CRL applies.
    Pending(&'static str),
}

use Expected::{Loaded, Pending, Rejected};

const ADMITTED: Result<(), Option<AlertDescription>> = Ok(());
const REVOKED: Result<(), Option<AlertDescription>> =
    Err(Some(AlertDescription::CertificateRevoked));
/// No CRL proves that the certificate is not revoked.
const STATUS_UNKNOWN: Result<(), Option<AlertDescription>> =
    Err(Some(AlertDescription::CertificateUnknown));

/// A CRL file, whose CRL numbers begin at the second argument of `crls`, and its expected handling.
struct Case {
    name: &'static str,
    crls: fn(&Pki, u64) -> Vec<u8>,
    expected: Expected,
}

/// An issuing distribution point extension with these fields (RFC 5280 section 5.2.5).
fn scoped(fields: &[Vec<u8>]) -> Vec<u8> {
    extension(DISTRIBUTION_POINT, ExtensionCriticality::Yes, &der(0x30, &fields.concat()))
}

/// A delta CRL: the changes since CRL number `base`.
fn delta(number: u64, base: u64, serials: &[u64]) -> CraftedCrl {
    let base = der(0x02, &integer(base));
    CraftedCrl::new(number, serials).with(extension(
        DELTA_INDICATOR,
        ExtensionCriticality::Yes,
        &base,
    ))
}

/// An indirect CRL: one that lists certificates of another issuer.
fn indirect(pki: &Pki, number: u64) -> CraftedCrl {
    let issuer = webpki::anchor_from_trusted_cert(pki.issuing.der()).expect("a CA certificate");
    let issuer = der(0x30, &der(0xa4, &der(0x30, &issuer.subject)));
    let entry_extensions = extension(CERTIFICATE_ISSUER, ExtensionCriticality::Yes, &issuer);
    let scope = scoped(&[der(0x84, &[0xff])]);
    CraftedCrl { entry_extensions, ..CraftedCrl::new(number, &[BAD]).with(scope) }
}

fn case(name: &'static str, expected: Expected, crls: fn(&Pki, u64) -> Vec<u8>) -> Case {
    Case { name, crls, expected }
}

fn complete_crls() -> Vec<Case> {
    use Caller::{Bad, Good, OfRoot, OfRootBad, OfSecondIntermediate};
    let revoked = |pki: &Pki, n| pki.with_clean_root(n, &CraftedCrl::new(n, &[BAD]));
    vec![
        case("good", Loaded(&[(Good, ADMITTED), (Bad, ADMITTED)]), |pki, n| {
            pki.with_clean_root(n, &CraftedCrl::new(n, &[]))
        }),
        case("leaf-revoked", Loaded(&[(Good, ADMITTED), (Bad, REVOKED)]), revoked),
        // Only the clients present the intermediate's certificate.
        case(
            "without-certificates",
            Loaded(&[(Good, ADMITTED), (Bad, REVOKED), (OfRoot, ADMITTED)]),
            |pki, n| {
                let issuing = CraftedCrl::new(n, &[BAD]).signed_by(&pki.issuing);
                [issuing, pki.clean_root(n)].map(|crl| crl_pem(&crl)).concat().into_bytes()
            },
        ),
        case("foreign-crl-too", Loaded(&[(Good, ADMITTED), (Bad, REVOKED)]), |pki, n| {
            let foreign = CraftedCrl::new(n, &[GOOD]).signed_by(&pki.untrusted);
            let issuing = CraftedCrl::new(n, &[BAD]).signed_by(&pki.issuing);
            pki.crl_file(&[foreign, issuing, pki.clean_root(n)])
        }),
        case(
            "intermediate-revoked",
            Loaded(&[(Good, ADMITTED), (OfSecondIntermediate, REVOKED)]),
            |pki, n| {
                let root = CraftedCrl::new(n, &[SECOND]).signed_by(&pki.root);
                let [issuing, second] =
                    [&pki.issuing, &pki.second].map(|ca| CraftedCrl::new(n, &[]).signed_by(ca));
                pki.crl_file(&[issuing, second, root])
            },
        ),
        case(
            "expired",
            Loaded(&[(Good, STATUS_UNKNOWN), (Bad, REVOKED), (OfRoot, ADMITTED)]),
            |pki, n| {
                pki.with_clean_root(
                    n,
                    &CraftedCrl { next_update: -1, ..CraftedCrl::new(n, &[BAD]) },
                )
            },
        ),
        case(
            "none-of-the-issuer",
            Loaded(&[(Good, STATUS_UNKNOWN), (OfRoot, ADMITTED)]),
            |pki, n| pki.crl_file(&[pki.clean_root(n)]),
        ),
        case(
            "none-of-the-root",
            Loaded(&[(Good, STATUS_UNKNOWN), (Bad, REVOKED), (OfRoot, STATUS_UNKNOWN)]),
            |pki, n| pki.crl_file(&[CraftedCrl::new(n, &[BAD]).signed_by(&pki.issuing)]),
        ),
        case("older-then-newer", Loaded(&[(Good, ADMITTED), (Bad, REVOKED)]), |pki, n| {
            let [older, newer] = [(n, GOOD), (n + 1, BAD)]
                .map(|(n, s)| CraftedCrl::new(n, &[s]).signed_by(&pki.issuing));
            pki.crl_file(&[older, newer, pki.clean_root(n)])
        }),
        case("newer-then-older", Loaded(&[(Good, ADMITTED), (Bad, REVOKED)]), |pki, n| {
            let [older, newer] = [(n, GOOD), (n + 1, BAD)]
                .map(|(n, s)| CraftedCrl::new(n, &[s]).signed_by(&pki.issuing));
            pki.crl_file(&[newer, older, pki.clean_root(n)])
        }),
        case("empty-file", Rejected("no CRL found"), |_, _| Vec::new()),
        case("only-comments", Rejected("no CRL found"), |_, _| b"# an empty CRL file\n".to_vec()),
        case(
            "der",
            Loaded(&[(OfRoot, ADMITTED), (OfRootBad, REVOKED), (Good, STATUS_UNKNOWN)]),
            |pki, n| CraftedCrl::new(n, &[OF_ROOT_BAD]).signed_by(&pki.root),
        ),
    ]
}

fn partial_crls() -> Vec<Case> {
    use Caller::{Bad, Good, WithPoint};
    vec![
        case(
            "of-another-point",
            Loaded(&[(WithPoint, STATUS_UNKNOWN), (Good, STATUS_UNKNOWN)]),
            |pki, n| {
                pki.with_clean_root(n, &CraftedCrl::new(n, &[]).with(scoped(&[point(OTHER_POINT)])))
            },
        ),
        case(
            "of-its-point",
            Loaded(&[(WithPoint, ADMITTED), (Good, STATUS_UNKNOWN), (Bad, REVOKED)]),
            |pki, n| {
                pki.with_clean_root(n, &CraftedCrl::new(n, &[BAD]).with(scoped(&[point(POINT)])))
            },
        ),
        case(
            "only-authorities",
            Loaded(&[(Good, STATUS_UNKNOWN), (Bad, STATUS_UNKNOWN)]),
            |pki, n| {
                pki.with_clean_root(n, &CraftedCrl::new(n, &[]).with(scoped(&[der(0x82, &[0xff])])))
            },
        ),
        case("only-leaves", Loaded(&[(Good, ADMITTED), (Bad, REVOKED)]), |pki, n| {
            pki.with_clean_root(n, &CraftedCrl::new(n, &[BAD]).with(scoped(&[der(0x81, &[0xff])])))
        }),
        case("base-and-delta", Loaded(&[(Good, ADMITTED), (Bad, REVOKED)]), |pki, n| {
            let base = CraftedCrl::new(n, &[]).signed_by(&pki.issuing);
            pki.crl_file(&[
                base,
                delta(n + 1, n, &[BAD]).signed_by(&pki.issuing),
                pki.clean_root(n),
            ])
        }),
        case("only-delta", Rejected("without its base CRL"), |pki, n| {
            pki.with_clean_root(n, &delta(n + 1, n, &[BAD]))
        }),
        case("base-and-indirect", Rejected("indirect CRLs are not supported"), |pki, n| {
            let base = CraftedCrl::new(n, &[]).signed_by(&pki.issuing);
            pki.crl_file(&[base, indirect(pki, n).signed_by(&pki.root), pki.clean_root(n)])
        }),
        case("some-reasons", Rejected("CRLs for some reasons only are not supported"), |pki, n| {
            let reasons = scoped(&[point(POINT), der(0x83, &[6, 0x40])]);
            pki.with_clean_root(n, &CraftedCrl::new(n, &[]).with(reasons))
        }),
    ]
}

fn faulty_crls() -> Vec<Case> {
    vec![
        case("from-the-future", Rejected("thisUpdate is in the future"), |pki, n| {
            pki.with_clean_root(n, &CraftedCrl { this_update: HOUR, ..CraftedCrl::new(n, &[]) })
        }),
        case("by-another-key", Pending("CRL is not signed by \"below\""), |pki, n| {
            let list = CraftedCrl::new(n, &[]).signed_as(pki.issuing.der(), &pki.untrusted);
            pki.crl_file(&[list, pki.clean_root(n)])
        }),
        case("by-a-namesake", Pending("CRL is not signed by \"below\""), |pki, n| {
            let mut file = pki
                .crl_file(&[CraftedCrl::new(n, &[]).signed_by(&pki.namesake), pki.clean_root(n)]);
            file.extend(pki.namesake.pem().into_bytes());
            file
        }),
        case("critical-extension", Rejected("unsupported critical extension"), |pki, n| {
            let odd = extension(UNKNOWN_EXTENSION, ExtensionCriticality::Yes, &[5, 0]);
            pki.with_clean_root(n, &CraftedCrl::new(n, &[]).with(odd))
        }),
        case("no-number", Rejected("CRL number is missing"), |pki, n| {
            let odd = extension(UNKNOWN_EXTENSION, ExtensionCriticality::No, &[5, 0]);
            pki.with_clean_root(
                n,
                &CraftedCrl { number: None, ..CraftedCrl::new(n, &[]).with(odd) },
            )
        }),
        case(
            "not-for-lists",
            Rejected("key usage of the issuer does not allow CRL signing"),
            |pki, n| {
                pki.crl_file(&[
                    CraftedCrl::new(n, &[]).signed_by(&pki.non_crl_signer),
                    pki.clean_root(n),
                ])
            },
        ),
        case("broken-block", Rejected("CRL 2: malformed CRL"), |pki, n| {
            let mut file = pki.with_clean_root(n, &CraftedCrl::new(n, &[BAD]));
            file.extend(b"-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n");
            file
        }),
        case("cut-off", Rejected("neither DER nor PEM"), |pki, n| {
            let lists = [crl_pem(&pki.clean_root(n)), crl_pem(&pki.clean_root(n + 1))].concat();
            lists.into_bytes().into_iter().rev().skip(40).rev().collect()
        }),
        case("der-cut-off", Rejected("malformed CRL"), |pki, n| {
            pki.clean_root(n).into_iter().rev().skip(1).rev().collect()
        }),
        case("too-many-entries", Rejected("more than 500000 entries"), |pki, n| {
            let serials: Vec<u64> = (0..=MOST_ENTRIES).map(|n| 1_000_000 + n).collect();
            CraftedCrl::new(n, &serials).signed_by(&pki.root)
        }),
    ]
}

/// Limit of the time from the revocation to the closing of a connection.
const CLOSE_DEADLINE: Duration = Duration::from_secs(1);

const MOST_ENTRIES: u64 = 500_000;

fn cases() -> Vec<Case> {
    [complete_crls(), partial_crls(), faulty_crls()].into_iter().flatten().collect()
}

/// A sidecar with one listener per name, each with a CRL file of its own.
struct CrlSidecar {
    pki: Pki,
    folder: TempDir,
    ports: BTreeMap<String, u16>,
    sidecar: TestSidecar,
    _sidecar_pki: MeshPki,
    _origin: OriginServer,
}

impl CrlSidecar {
    /// Starts the sidecar with these CRL files.
    fn start(pki: Pki, files: &[(&str, Vec<u8>)]) -> Self {
        Self::start_by(TestSidecar::launch, pki, files)
    }

    fn start_by(
        launch_sidecar: fn(&SidecarLaunch, &MeshPki, [u16; 2], &Value) -> TestSidecar,
        pki: Pki,
        files: &[(&str, Vec<u8>)],
    ) -> Self {
        let folder = TempDir::new().expect("a temporary folder can be created");
        let origin = OriginServer::start();
        let file = |name: &str| folder.path().join(name);
        write(&file("roots"), pki.root.pem().as_bytes());
        write(&file("server.pem"), pki.server.chain.as_bytes());
        write(&file("server.key"), pki.server.key.as_bytes());
        let private = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        std::fs::set_permissions(file("server.key"), private).expect("the test owns the file");
        let own = Files {
            certificate: file("server.pem"),
            key: file("server.key"),
            serial: String::new(),
        };
        let mut ports = BTreeMap::new();
        let mut listeners = Vec::new();
        for (name, crls) in files {
            write(&file(name), crls);
            let port = port::free();
            let tls = verify_mode(&own, &file("roots"), &file(name));
            let http = http(&route_to("service", 15), &[]);
            listeners.push(listener(name, port, http, Some(tls)));
            ports.insert((*name).to_owned(), port);
        }
        let service = cluster("service", &[origin.port], UpstreamHttp::Http1, None);
        let admin = port::free();
        let sidecar_pki = MeshPki::create();
        let config = bootstrap(admin, &listeners, &[service]);
        let first = *ports.values().next().expect("there is a listener");
        let launch = SidecarLaunch { workers: 1, ..SidecarLaunch::default() };
        let sidecar = launch_sidecar(&launch, &sidecar_pki, [first, admin], &config);
        Self { pki, folder, ports, sidecar, _sidecar_pki: sidecar_pki, _origin: origin }
    }

    fn port(&self, name: &str) -> u16 {
        *self.ports.get(name).expect("the listener exists")
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn dump(&self) -> Value {
        let text = Curl::get(self.sidecar.admin, "/config_dump").run().text();
        serde_json::from_str(&text).expect("the configuration dump is JSON")
    }

    /// Pending until a listener has only CRLs of this number or a later one, and no problem is reported.
    fn wait_loaded(&self, name: &str, number: u64) {
        let key = format!("listener {name} chain 0");
        eventually(format!("{name} has CRLs of number {number} or later"), || {
            let dump = self.dump();
            let lists = dump.get("revocation")?.get(&key)?.get("lists")?.as_array()?;
            let is_new = |list: &Value| {
                let digits = list.get("number").and_then(Value::as_str);
                digits.and_then(|digits| u64::from_str_radix(digits, 16).ok()) >= Some(number)
            };
            let is_loaded = !lists.is_empty() && lists.iter().all(is_new);
            let is_stale =
                |problem: &String| problem.contains(&key) && problem.contains("stays in force");
            (is_loaded && !problems(&dump).iter().any(is_stale)).then_some(())
        });
    }

    /// Pending until `/config_dump` reports that a listener's CRLs are rejected. Returns the reported problem.
    fn wait_rejected(&self, name: &str, reason: &str) -> String {
        // The problem names the listener either in quotes or together with its chain.
        let quoted = format!("listener {name:?} ");
        let with_chain = format!("listener {name} chain 0");
        eventually(format!("{name} reports: {reason}"), || {
            let names_listener =
                |problem: &str| problem.contains(&quoted) || problem.contains(&with_chain);
            let all = problems(&self.dump());
            all.into_iter().find(|problem| names_listener(problem) && problem.contains(reason))
        })
    }
}

fn problems(dump: &Value) -> Vec<String> {
    let problems = dump.get("problems").and_then(Value::as_array).cloned().unwrap_or_default();
    problems.iter().filter_map(Value::as_str).map(str::to_owned).collect()
}

/// Writes a file atomically.
fn write(path: &Path, bytes: &[u8]) {
    let part = path.with_extension("part");
    std::fs::write(&part, bytes).expect("the folder is writable");
    std::fs::rename(part, path).expect("a file can be renamed");
}

/// Differences between the callers that a listener admits and those that it should admit.
///
/// `expected` belongs to the listener's current CRL file, `before` to the file that it had before.
fn mismatches(
    sidecar: &CrlSidecar,
    name: &str,
    expected: Expected,
    before: Expected,
) -> Vec<String> {
    let Loaded(calls) = (match expected {
        Loaded(_) => expected,
        Rejected(_) => before,
        Pending(_) if matches!(before, Rejected(_)) => Loaded(&[
            (Caller::Good, STATUS_UNKNOWN),
            (Caller::Bad, STATUS_UNKNOWN),
            (Caller::OfRoot, ADMITTED),
        ]),
        Pending(_) => before,
    }) else {
        return [Caller::Good, Caller::Bad, Caller::OfRoot]
            .into_iter()
            .filter_map(|caller| {
                let got = sidecar.pki.call(caller, sidecar.port(name));
                (got != Err(None)).then(|| format!("{name}: {caller:?} gets {got:?} without a CRL"))
            })
            .collect();
    };
    let mismatch = |(caller, expected): &(Caller, Result<(), Option<AlertDescription>>)| {
        let got = sidecar.pki.call(*caller, sidecar.port(name));
        (got != *expected).then(|| format!("{name}: {caller:?} gets {got:?}, not {expected:?}"))
    };
    calls.iter().filter_map(mismatch).collect()
}

/// Pending until the sidecar has loaded or rejected what was written to a listener's CRL file.
fn wait_for(sidecar: &CrlSidecar, case: &Case, number: u64) {
    let Case { name, expected, .. } = case;
    match expected {
        Loaded(_) => sidecar.wait_loaded(name, number),
        Rejected(reason) | Pending(reason) => drop(sidecar.wait_rejected(name, reason)),
    }
}

#[test]
fn each_kind_of_crl_admits_no_unproven_client_with_and_without_a_good_one_before() {
    const GOOD_CRL: Expected = Loaded(&[(Caller::Good, ADMITTED), (Caller::Bad, REVOKED)]);
    let pki = Pki::new();
    let cases = cases();
    let files: Vec<(&str, Vec<u8>)> =
        cases.iter().map(|case| (case.name, (case.crls)(&pki, 0x10))).collect();
    let sidecar = CrlSidecar::start_by(TestSidecar::launch_unready, pki, &files);
    let mut wrong = Vec::new();
    for case in &cases {
        wait_for(&sidecar, case, 0x10);
        let no_crl = Rejected("no CRL before");
        wrong.extend(mismatches(&sidecar, case.name, case.expected, no_crl));
    }

    for Case { name, .. } in &cases {
        let good = sidecar.pki.with_clean_root(0x20, &CraftedCrl::new(0x20, &[BAD]));
        write(&sidecar.file(name), &good);
    }
    for Case { name, .. } in &cases {
        sidecar.wait_loaded(name, 0x20);
        wrong.extend(mismatches(&sidecar, name, GOOD_CRL, GOOD_CRL));
    }

    for Case { name, crls, .. } in &cases {
        write(&sidecar.file(name), &crls(&sidecar.pki, 0x30));
    }
    for case in &cases {
        wait_for(&sidecar, case, 0x30);
        if let Rejected(reason) = case.expected {
            let problem = sidecar.wait_rejected(case.name, reason);
            assert!(problem.ends_with("the last good one stays in force"), "{problem}");
        }
        wrong.extend(mismatches(&sidecar, case.name, case.expected, GOOD_CRL));
    }
    assert!(wrong.is_empty(), "{} wrong results:\n{}", wrong.len(), wrong.join("\n"));
}

/// A TLS client that resumes sessions.
fn resuming_client(pki: &Pki, caller: Caller) -> ClientTls {
    let holder = pki.holder(caller);
    let identity = LoadedIdentity::load(holder.chain.as_bytes(), holder.key.as_bytes());
    let roots = pki.root.pem();
    let trust = TrustStore::load(roots.as_bytes(), None, Vec::new(), None, UnixTime::now());
    let names = vec![weft_model::StringMatch::Exact(spiffe_id("server"))];
    let identity = identity.expect("the certificate and key are an identity");
    let alpn = ["http/1.1".to_owned()];
    let trust = Arc::new(trust.expect("the root certificate is accepted"));
    ClientTls::new(Some(&identity), trust, names, &alpn, &weft_model::TlsParameters::default())
        .expect("the client can be configured")
}

#[test]
fn revoked_client_is_disconnected_and_refused_in_full_and_resumed_handshakes() {
    let pki = Pki::new();
    let first = pki.with_clean_root(1, &CraftedCrl::new(1, &[]));
    let sidecar = CrlSidecar::start(pki, &[("live", first)]);
    let pki = &sidecar.pki;
    let port = sidecar.port("live");
    let clients = [Caller::Good, Caller::Bad].map(|caller| resuming_client(pki, caller));
    let call = |client: &ClientTls| {
        let mut caller = TlsClient::connect(port, client.config());
        let status = caller.ask("/");
        (caller, status)
    };
    let mut live = Vec::new();
    for client in &clients {
        // The first connection yields the session that the second resumes.
        assert_eq!(call(client).1, Some(200));
        let (caller, status) = call(client);
        assert_eq!((status, caller.is_resumed()), (Some(200), true));
        live.push(caller);
    }
    write(&sidecar.file("live"), &pki.with_clean_root(2, &CraftedCrl::new(2, &[BAD])));
    sidecar.wait_loaded("live", 2);
    let [mut good, mut bad]: [TlsClient; 2] = live.try_into().expect("two connections were opened");
    assert!(bad.ends_within(CLOSE_DEADLINE), "the revoked client's connection is closed");
    assert_eq!(good.ask("/"), Some(200), "the other client's connection stays open");

    let [good, bad] = &clients;
    let (caller, status) = call(bad);
    assert_eq!(status, None, "resumed: {}", caller.is_resumed());
    assert_eq!(pki.call(Caller::Bad, port), REVOKED, "a full handshake");
    let (caller, status) = call(good);
    assert_eq!(status, Some(200), "resumed: {}", caller.is_resumed());
    assert_eq!(pki.call(Caller::Good, port), ADMITTED);
}

#[test]
fn crl_with_500000_entries_is_loaded_and_its_last_entry_is_enforced() {
    let pki = Pki::new();
    let first = pki.with_clean_root(1, &CraftedCrl::new(1, &[]));
    let sidecar = CrlSidecar::start(pki, &[("many", first)]);
    let pki = &sidecar.pki;
    let port = sidecar.port("many");
    assert_eq!(pki.call(Caller::Bad, port), ADMITTED);
    // The entry of the caller comes last.
    let mut serials: Vec<u64> = (1..MOST_ENTRIES).map(|n| (1 << 40) + n).collect();
    serials.push(BAD);
    write(&sidecar.file("many"), &pki.with_clean_root(2, &CraftedCrl::new(2, &serials)));
    sidecar.wait_loaded("many", 2);
    assert_eq!(sidecar.sidecar.metric("weft_sidecar_crl_revoked_certificates"), MOST_ENTRIES);
    assert_eq!(pki.call(Caller::Bad, port), REVOKED);
    assert_eq!(pki.call(Caller::Good, port), ADMITTED);
}

#[test]
fn removed_crl_file_stays_in_force_until_a_newer_one_replaces_it() {
    let pki = Pki::new();
    let first = pki.with_clean_root(1, &CraftedCrl::new(1, &[BAD]));
    let sidecar = CrlSidecar::start(pki, &[("gone", first)]);
    let pki = &sidecar.pki;
    let port = sidecar.port("gone");
    let check = |good, bad| {
        assert_eq!(pki.call(Caller::Good, port), good);
        assert_eq!(pki.call(Caller::Bad, port), bad);
    };
    check(ADMITTED, REVOKED);
    std::fs::remove_file(sidecar.file("gone")).expect("the file exists");
    let problem = sidecar.wait_rejected("gone", "last good one stays in force");
    assert!(problem.contains("No such file"), "{problem}");
    check(ADMITTED, REVOKED);
    write(&sidecar.file("gone"), &pki.with_clean_root(2, &CraftedCrl::new(2, &[GOOD, BAD])));
    sidecar.wait_loaded("gone", 2);
    check(REVOKED, REVOKED);
    // A CRL that is older than the one in force is rejected.
    write(&sidecar.file("gone"), &pki.with_clean_root(1, &CraftedCrl::new(1, &[])));
    sidecar.wait_rejected("gone", "is older than the one in force, which stays");
    check(REVOKED, REVOKED);
    write(&sidecar.file("gone"), &pki.with_clean_root(3, &CraftedCrl::new(3, &[])));
    sidecar.wait_loaded("gone", 3);
    check(ADMITTED, ADMITTED);
    assert_eq!(json!(problems(&sidecar.dump())), json!([]));
}
