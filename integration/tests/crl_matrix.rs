//! What a sidecar makes of each kind of revocation list: whom it lets in, and what it does not load.
//!
//! A situation comes twice: to a listener that has never had a good list, and to one that has.

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
use weft_certs::tls::{Client, Identity};
use weft_integration::authority::PemIdentity;
use weft_integration::bootstrap::{
    UpstreamHttp, bootstrap, cluster, http, listener, route_to, verify_mode,
};
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
use weft_integration::wait::eventually;

/// Who calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Who {
    /// Whom no list names, below the intermediate.
    Good,
    /// Whom lists name.
    Bad,
    /// Whose certificate says at which point its list is.
    Pointed,
    /// Below an intermediate that lists of the root name.
    Cousin,
    /// Below an intermediate whose key is not for lists.
    Mute,
    /// Whom the root itself has signed.
    Direct,
    /// The same, and lists name it.
    DirectBad,
}

const GOOD: u64 = 1000;
const BAD: u64 = 1001;
const DIRECT_BAD: u64 = 1006;
const BELOW: u64 = 50;
const COUSIN: u64 = 51;
const MUTE: u64 = 52;

const HERE: &str = "http://lists.mesh.local/here";
const ELSEWHERE: &str = "http://lists.mesh.local/elsewhere";

/// The numbers of the extensions of lists.
const DELTA_INDICATOR: u8 = 27;
const DISTRIBUTION_POINT: u8 = 28;
const CERTIFICATE_ISSUER: u8 = 29;
const UNHEARD_OF: u8 = 127;

/// All that signs, and all that was signed.
struct World {
    root: CraftedCa,
    below: CraftedCa,
    cousin: CraftedCa,
    mute: CraftedCa,
    /// Nobody that is trusted.
    stranger: CraftedCa,
    /// Nobody that is trusted either, by the name of `below`.
    twin: CraftedCa,
    callers: BTreeMap<Who, PemIdentity>,
    server: PemIdentity,
}

impl World {
    fn new() -> Self {
        let root = root(authority_params("root", 1));
        let below = intermediate(authority_params("below", BELOW), &root);
        let cousin = intermediate(authority_params("cousin", COUSIN), &root);
        let mut params = authority_params("mute", MUTE);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let mute = intermediate(params, &root);
        let stranger = weft_integration::crafted_pki::root(authority_params("stranger", 1));
        let twin = intermediate(authority_params("below", BELOW), &stranger);
        let params = |service: &str, serial| {
            let mut params = leaf_params(Some(service), serial);
            params.custom_extensions.push(names(&[(URI, spiffe_id(service).as_bytes())]));
            params
        };
        let mut pointed = params("pointed", 1002);
        pointed.custom_extensions.push(distribution_point(HERE));
        let callers = BTreeMap::from([
            (Who::Good, leaf(&params("good", GOOD), &below, &[&below])),
            (Who::Bad, leaf(&params("bad", BAD), &below, &[&below])),
            (Who::Pointed, leaf(&pointed, &below, &[&below])),
            (Who::Cousin, leaf(&params("cousin", 1003), &cousin, &[&cousin])),
            (Who::Mute, leaf(&params("mute", 1004), &mute, &[&mute])),
            (Who::Direct, leaf(&params("direct", 1005), &root, &[])),
            (Who::DirectBad, leaf(&params("direct", DIRECT_BAD), &root, &[])),
        ]);
        let server = leaf(&params("server", 1007), &below, &[&below]);
        Self { root, below, cousin, mute, stranger, twin, callers, server }
    }

    /// A file of lists, PEM, with the certificates of those who may have signed them.
    fn set(&self, lists: &[Vec<u8>]) -> Vec<u8> {
        let lists: String = lists.iter().map(|list| crl_pem(list)).collect();
        let beside = [&self.below, &self.cousin, &self.mute].map(|ca| ca.pem()).concat();
        (lists + &beside).into_bytes()
    }

    /// The same of a list that is the intermediate's, and the root's, which revokes nothing.
    fn below(&self, number: u64, list: &CraftedCrl) -> Vec<u8> {
        self.set(&[list.signed_by(&self.below), self.clean_root(number)])
    }

    fn clean_root(&self, number: u64) -> Vec<u8> {
        CraftedCrl::new(number, &[]).signed_by(&self.root)
    }

    fn holder(&self, who: Who) -> &PemIdentity {
        self.callers.get(&who).expect("everybody has a certificate")
    }

    /// Whether a sidecar lets somebody in.
    fn call(&self, who: Who, port: u16) -> Result<(), Option<AlertDescription>> {
        let config =
            client_config_trusting(&self.root.pem(), self.holder(who), "server", "http/1.1");
        let mut caller = TlsClient::connect(port, &config);
        caller.handshake_result()?;
        assert_eq!(caller.ask("/"), Some(200), "{who:?} is served who is let in");
        Ok(())
    }
}

/// What must come of a file of lists.
#[derive(Clone, Copy)]
enum Outcome {
    /// It is loaded, and these are let in or not.
    Loaded(&'static [(Who, Result<(), Option<AlertDescription>>)]),
    /// It is not loaded, for a reason with these words.
    Refused(&'static str),
    /// The intermediate's list counts for nobody, for a reason with these words; the root's does.
    Waits(&'static str),
}

use Outcome::{Loaded, Refused, Waits};

const LET_IN: Result<(), Option<AlertDescription>> = Ok(());
const REVOKED: Result<(), Option<AlertDescription>> =
    Err(Some(AlertDescription::CertificateRevoked));
/// The lists do not say that it is good.
const UNPROVED: Result<(), Option<AlertDescription>> =
    Err(Some(AlertDescription::CertificateUnknown));

/// A file of lists, from a number on, and what must come of it.
struct Situation {
    name: &'static str,
    lists: fn(&World, u64) -> Vec<u8>,
    outcome: Outcome,
}

fn scoped(fields: &[Vec<u8>]) -> Vec<u8> {
    extension(DISTRIBUTION_POINT, ExtensionCriticality::Yes, &der(0x30, &fields.concat()))
}

/// A list of what changed since number `base`.
fn delta(number: u64, base: u64, serials: &[u64]) -> CraftedCrl {
    let base = der(0x02, &integer(base));
    CraftedCrl::new(number, serials).with(extension(
        DELTA_INDICATOR,
        ExtensionCriticality::Yes,
        &base,
    ))
}

/// A list that speaks of certificates that others signed.
fn indirect(world: &World, number: u64) -> CraftedCrl {
    let issuer = webpki::anchor_from_trusted_cert(world.below.der()).expect("an authority");
    let issuer = der(0x30, &der(0xa4, &der(0x30, &issuer.subject)));
    let entry_extensions = extension(CERTIFICATE_ISSUER, ExtensionCriticality::Yes, &issuer);
    let scope = scoped(&[der(0x84, &[0xff])]);
    CraftedCrl { entry_extensions, ..CraftedCrl::new(number, &[BAD]).with(scope) }
}

fn of(name: &'static str, outcome: Outcome, lists: fn(&World, u64) -> Vec<u8>) -> Situation {
    Situation { name, lists, outcome }
}

fn ordinary() -> Vec<Situation> {
    use Who::{Bad, Cousin, Direct, DirectBad, Good};
    let revoked = |w: &World, n| w.below(n, &CraftedCrl::new(n, &[BAD]));
    vec![
        of("good", Loaded(&[(Good, LET_IN), (Bad, LET_IN)]), |w, n| {
            w.below(n, &CraftedCrl::new(n, &[]))
        }),
        of("leaf-revoked", Loaded(&[(Good, LET_IN), (Bad, REVOKED)]), revoked),
        // The intermediate's certificate comes from its clients alone.
        of(
            "without-certificates",
            Loaded(&[(Good, LET_IN), (Bad, REVOKED), (Direct, LET_IN)]),
            |w, n| {
                let below = CraftedCrl::new(n, &[BAD]).signed_by(&w.below);
                [below, w.clean_root(n)].map(|list| crl_pem(&list)).concat().into_bytes()
            },
        ),
        of("foreign-list-beside", Loaded(&[(Good, LET_IN), (Bad, REVOKED)]), |w, n| {
            let foreign = CraftedCrl::new(n, &[GOOD]).signed_by(&w.stranger);
            let below = CraftedCrl::new(n, &[BAD]).signed_by(&w.below);
            w.set(&[foreign, below, w.clean_root(n)])
        }),
        of("intermediate-revoked", Loaded(&[(Good, LET_IN), (Cousin, REVOKED)]), |w, n| {
            let root = CraftedCrl::new(n, &[COUSIN]).signed_by(&w.root);
            let [below, cousin] =
                [&w.below, &w.cousin].map(|ca| CraftedCrl::new(n, &[]).signed_by(ca));
            w.set(&[below, cousin, root])
        }),
        of("expired", Loaded(&[(Good, UNPROVED), (Bad, REVOKED), (Direct, LET_IN)]), |w, n| {
            w.below(n, &CraftedCrl { next_update: -1, ..CraftedCrl::new(n, &[BAD]) })
        }),
        of("none-of-the-issuer", Loaded(&[(Good, UNPROVED), (Direct, LET_IN)]), |w, n| {
            w.set(&[w.clean_root(n)])
        }),
        of(
            "none-of-the-root",
            Loaded(&[(Good, UNPROVED), (Bad, REVOKED), (Direct, UNPROVED)]),
            |w, n| w.set(&[CraftedCrl::new(n, &[BAD]).signed_by(&w.below)]),
        ),
        of("older-then-newer", Loaded(&[(Good, LET_IN), (Bad, REVOKED)]), |w, n| {
            let [older, newer] = [(n, GOOD), (n + 1, BAD)]
                .map(|(n, s)| CraftedCrl::new(n, &[s]).signed_by(&w.below));
            w.set(&[older, newer, w.clean_root(n)])
        }),
        of("newer-then-older", Loaded(&[(Good, LET_IN), (Bad, REVOKED)]), |w, n| {
            let [older, newer] = [(n, GOOD), (n + 1, BAD)]
                .map(|(n, s)| CraftedCrl::new(n, &[s]).signed_by(&w.below));
            w.set(&[newer, older, w.clean_root(n)])
        }),
        of("empty-file", Refused("there is no revocation list in it"), |_, _| Vec::new()),
        of("only-comments", Refused("there is no revocation list in it"), |_, _| {
            b"# nobody is revoked\n".to_vec()
        }),
        of("der", Loaded(&[(Direct, LET_IN), (DirectBad, REVOKED), (Good, UNPROVED)]), |w, n| {
            CraftedCrl::new(n, &[DIRECT_BAD]).signed_by(&w.root)
        }),
    ]
}

fn in_part() -> Vec<Situation> {
    use Who::{Bad, Good, Pointed};
    vec![
        of("of-another-point", Loaded(&[(Pointed, UNPROVED), (Good, UNPROVED)]), |w, n| {
            w.below(n, &CraftedCrl::new(n, &[]).with(scoped(&[point(ELSEWHERE)])))
        }),
        of(
            "of-its-point",
            Loaded(&[(Pointed, LET_IN), (Good, UNPROVED), (Bad, REVOKED)]),
            |w, n| w.below(n, &CraftedCrl::new(n, &[BAD]).with(scoped(&[point(HERE)]))),
        ),
        of("only-authorities", Loaded(&[(Good, UNPROVED), (Bad, UNPROVED)]), |w, n| {
            w.below(n, &CraftedCrl::new(n, &[]).with(scoped(&[der(0x82, &[0xff])])))
        }),
        of("only-leaves", Loaded(&[(Good, LET_IN), (Bad, REVOKED)]), |w, n| {
            w.below(n, &CraftedCrl::new(n, &[BAD]).with(scoped(&[der(0x81, &[0xff])])))
        }),
        of("base-and-delta", Loaded(&[(Good, LET_IN), (Bad, REVOKED)]), |w, n| {
            let base = CraftedCrl::new(n, &[]).signed_by(&w.below);
            w.set(&[base, delta(n + 1, n, &[BAD]).signed_by(&w.below), w.clean_root(n)])
        }),
        of("only-delta", Refused("which is not here"), |w, n| w.below(n, &delta(n + 1, n, &[BAD]))),
        of("base-and-indirect", Refused("indirect lists are not supported"), |w, n| {
            let base = CraftedCrl::new(n, &[]).signed_by(&w.below);
            w.set(&[base, indirect(w, n).signed_by(&w.root), w.clean_root(n)])
        }),
        of("some-reasons", Refused("lists for some reasons only are not supported"), |w, n| {
            let reasons = scoped(&[point(HERE), der(0x83, &[6, 0x40])]);
            w.below(n, &CraftedCrl::new(n, &[]).with(reasons))
        }),
    ]
}

fn faulty() -> Vec<Situation> {
    vec![
        of("from-the-future", Refused("its thisUpdate is in the future"), |w, n| {
            w.below(n, &CraftedCrl { this_update: HOUR, ..CraftedCrl::new(n, &[]) })
        }),
        of("by-another-key", Waits("its signature is not by \"below\""), |w, n| {
            let list = CraftedCrl::new(n, &[]).signed_as(w.below.der(), &w.stranger);
            w.set(&[list, w.clean_root(n)])
        }),
        of("by-a-namesake", Waits("its signature is not by \"below\""), |w, n| {
            let mut file = w.set(&[CraftedCrl::new(n, &[]).signed_by(&w.twin), w.clean_root(n)]);
            file.extend(w.twin.pem().into_bytes());
            file
        }),
        of("critical-extension", Refused("a critical extension that is not supported"), |w, n| {
            let odd = extension(UNHEARD_OF, ExtensionCriticality::Yes, &[5, 0]);
            w.below(n, &CraftedCrl::new(n, &[]).with(odd))
        }),
        of("no-number", Refused("it has no CRL number"), |w, n| {
            let odd = extension(UNHEARD_OF, ExtensionCriticality::No, &[5, 0]);
            w.below(n, &CraftedCrl { number: None, ..CraftedCrl::new(n, &[]).with(odd) })
        }),
        of("not-for-lists", Refused("its issuer's key is not for signing lists"), |w, n| {
            w.set(&[CraftedCrl::new(n, &[]).signed_by(&w.mute), w.clean_root(n)])
        }),
        of("broken-block", Refused("revocation list 2: it is malformed"), |w, n| {
            let mut file = w.below(n, &CraftedCrl::new(n, &[BAD]));
            file.extend(b"-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n");
            file
        }),
        of("cut-off", Refused("it is neither DER nor PEM"), |w, n| {
            let lists = [crl_pem(&w.clean_root(n)), crl_pem(&w.clean_root(n + 1))].concat();
            lists.into_bytes().into_iter().rev().skip(40).rev().collect()
        }),
        of("der-cut-off", Refused("it is malformed"), |w, n| {
            w.clean_root(n).into_iter().rev().skip(1).rev().collect()
        }),
        of("too-many-entries", Refused("more than 500000 entries"), |w, n| {
            let serials: Vec<u64> = (0..=MOST_ENTRIES).map(|n| 1_000_000 + n).collect();
            CraftedCrl::new(n, &serials).signed_by(&w.root)
        }),
    ]
}

/// How long it may take until a connection is ended.
const AT_ONCE: Duration = Duration::from_secs(1);

const MOST_ENTRIES: u64 = 500_000;

fn situations() -> Vec<Situation> {
    [ordinary(), in_part(), faulty()].into_iter().flatten().collect()
}

/// A sidecar with a listener for each name, each with a file of lists of its own.
struct Lined {
    world: World,
    folder: TempDir,
    ports: BTreeMap<String, u16>,
    sidecar: TestSidecar,
    _pki: MeshPki,
    _origin: OriginServer,
}

impl Lined {
    /// Starts it, with what each file holds.
    fn start(world: World, files: &[(&str, Vec<u8>)]) -> Self {
        Self::start_by(TestSidecar::launch, world, files)
    }

    fn start_by(
        launch_sidecar: fn(&SidecarLaunch, &MeshPki, [u16; 2], &Value) -> TestSidecar,
        world: World,
        files: &[(&str, Vec<u8>)],
    ) -> Self {
        let (folder, origin) = (TempDir::new().expect("a folder"), OriginServer::start());
        let file = |name: &str| folder.path().join(name);
        write(&file("roots"), world.root.pem().as_bytes());
        write(&file("server.pem"), world.server.chain.as_bytes());
        write(&file("server.key"), world.server.key.as_bytes());
        let ours = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        std::fs::set_permissions(file("server.key"), ours).expect("it is ours");
        let own = Files {
            certificate: file("server.pem"),
            key: file("server.key"),
            serial: String::new(),
        };
        let (mut ports, mut listeners) = (BTreeMap::new(), Vec::new());
        for (name, lists) in files {
            write(&file(name), lists);
            let (port, tls) = (port::free(), verify_mode(&own, &file("roots"), &file(name)));
            let http = http(&route_to("service", 15), &[]);
            listeners.push(listener(name, port, http, Some(tls)));
            ports.insert((*name).to_owned(), port);
        }
        let service = cluster("service", &[origin.port], UpstreamHttp::Http1, None);
        let (admin, pki) = (port::free(), MeshPki::create());
        let config = bootstrap(admin, &listeners, &[service]);
        let first = *ports.values().next().expect("there is a listener");
        let launch = SidecarLaunch { workers: 1, ..SidecarLaunch::default() };
        let sidecar = launch_sidecar(&launch, &pki, [first, admin], &config);
        Self { world, folder, ports, sidecar, _pki: pki, _origin: origin }
    }

    fn port(&self, name: &str) -> u16 {
        *self.ports.get(name).expect("there is such a listener")
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn dump(&self) -> Value {
        let text = Curl::get(self.sidecar.admin, "/config_dump").run().text();
        serde_json::from_str(&text).expect("it is JSON")
    }

    /// Waits until a listener has lists of this number or a later one, and no complaint.
    fn wait_loaded(&self, name: &str, number: u64) {
        let key = format!("listener {name} chain 0");
        eventually(format!("{name} has lists from number {number} on"), || {
            let dump = self.dump();
            let lists = dump.get("revocation")?.get(&key)?.get("lists")?.as_array()?;
            let is_new = |list: &Value| {
                let digits = list.get("number").and_then(Value::as_str);
                digits.and_then(|digits| u64::from_str_radix(digits, 16).ok()) >= Some(number)
            };
            let is_loaded = !lists.is_empty() && lists.iter().all(is_new);
            let is_stale = |told: &String| told.contains(&key) && told.contains("stays in force");
            (is_loaded && !problems(&dump).iter().any(is_stale)).then_some(())
        });
    }

    /// Waits until it is told that a listener's lists are refused; gives what is told.
    fn wait_refused(&self, name: &str, reason: &str) -> String {
        // The listener's name stands in quotes, or with its chain's.
        let (quoted, bare) = (format!("listener {name:?} "), format!("listener {name} chain 0"));
        eventually(format!("{name} is told to be refused: {reason}"), || {
            let is_of_it = |told: &str| told.contains(&quoted) || told.contains(&bare);
            let all = problems(&self.dump());
            all.into_iter().find(|told| is_of_it(told) && told.contains(reason))
        })
    }
}

fn problems(dump: &Value) -> Vec<String> {
    let told = dump.get("problems").and_then(Value::as_array).cloned().unwrap_or_default();
    told.iter().filter_map(Value::as_str).map(str::to_owned).collect()
}

/// Writes a file whole and at once.
fn write(path: &Path, bytes: &[u8]) {
    let part = path.with_extension("part");
    std::fs::write(&part, bytes).expect("the folder takes files");
    std::fs::rename(part, path).expect("a file can be renamed");
}

/// What is wrong with whom a listener lets in, where `outcome` comes to one that had these before.
fn verdicts(lined: &Lined, name: &str, outcome: Outcome, before: Outcome) -> Vec<String> {
    let Loaded(expected) = (match outcome {
        Loaded(_) => outcome,
        Refused(_) => before,
        Waits(_) if matches!(before, Refused(_)) => {
            Loaded(&[(Who::Good, UNPROVED), (Who::Bad, UNPROVED), (Who::Direct, LET_IN)])
        }
        Waits(_) => before,
    }) else {
        return [Who::Good, Who::Bad, Who::Direct]
            .into_iter()
            .filter_map(|who| {
                let got = lined.world.call(who, lined.port(name));
                (got != Err(None)).then(|| format!("{name}: {who:?} gets {got:?} without a list"))
            })
            .collect();
    };
    let wrong = expected.iter().filter_map(|(who, expected)| {
        let got = lined.world.call(*who, lined.port(name));
        (got != *expected).then(|| format!("{name}: {who:?} gets {got:?}, not {expected:?}"))
    });
    wrong.collect()
}

/// Waits until what was written to a listener's file has come through.
fn wait_for(lined: &Lined, situation: &Situation, number: u64) {
    let Situation { name, outcome, .. } = situation;
    match outcome {
        Loaded(_) => lined.wait_loaded(name, number),
        Refused(reason) | Waits(reason) => drop(lined.wait_refused(name, reason)),
    }
}

#[test]
fn each_kind_of_list_is_judged_safely_with_and_without_a_good_one_before() {
    const OLD: Outcome = Loaded(&[(Who::Good, LET_IN), (Who::Bad, REVOKED)]);
    let (world, situations) = (World::new(), situations());
    let files: Vec<(&str, Vec<u8>)> =
        situations.iter().map(|one| (one.name, (one.lists)(&world, 0x10))).collect();
    let lined = Lined::start_by(TestSidecar::launch_unready, world, &files);
    let mut wrong = Vec::new();
    for situation in &situations {
        wait_for(&lined, situation, 0x10);
        let nothing = Refused("there was none");
        wrong.extend(verdicts(&lined, situation.name, situation.outcome, nothing));
    }

    for Situation { name, .. } in &situations {
        let old = lined.world.below(0x20, &CraftedCrl::new(0x20, &[BAD]));
        write(&lined.file(name), &old);
    }
    for Situation { name, .. } in &situations {
        lined.wait_loaded(name, 0x20);
        wrong.extend(verdicts(&lined, name, OLD, OLD));
    }

    for Situation { name, lists, .. } in &situations {
        write(&lined.file(name), &lists(&lined.world, 0x30));
    }
    for situation in &situations {
        wait_for(&lined, situation, 0x30);
        if let Refused(reason) = situation.outcome {
            let told = lined.wait_refused(situation.name, reason);
            assert!(told.ends_with("the last good one stays in force"), "{told}");
        }
        wrong.extend(verdicts(&lined, situation.name, situation.outcome, OLD));
    }
    assert!(wrong.is_empty(), "{} unsafe:\n{}", wrong.len(), wrong.join("\n"));
}

/// A client that resumes sessions.
fn resuming(world: &World, who: Who) -> Client {
    let holder = world.holder(who);
    let identity = Identity::load(holder.chain.as_bytes(), holder.key.as_bytes());
    let roots = world.root.pem();
    let trust = TrustStore::load(roots.as_bytes(), None, Vec::new(), None, UnixTime::now());
    let names = vec![weft_model::StringMatch::Exact(spiffe_id("server"))];
    let identity = identity.expect("it is an identity");
    let alpn = ["http/1.1".to_owned()];
    let trust = Arc::new(trust.expect("it is a root"));
    Client::new(Some(&identity), trust, names, &alpn, &weft_model::TlsParameters::default())
        .expect("a client")
}

#[test]
fn who_is_revoked_is_sent_away_and_comes_back_neither_anew_nor_by_a_session() {
    let world = World::new();
    let first = world.below(1, &CraftedCrl::new(1, &[]));
    let lined = Lined::start(world, &[("live", first)]);
    let (world, port) = (&lined.world, lined.port("live"));
    let clients = [Who::Good, Who::Bad].map(|who| resuming(world, who));
    let call = |client: &Client| {
        let mut caller = TlsClient::connect(port, client.config());
        let status = caller.ask("/");
        (caller, status)
    };
    let mut live = Vec::new();
    for client in &clients {
        // The first brings the session that the second takes up.
        assert_eq!(call(client).1, Some(200));
        let (caller, status) = call(client);
        assert_eq!((status, caller.is_resumed()), (Some(200), true));
        live.push(caller);
    }
    write(&lined.file("live"), &world.below(2, &CraftedCrl::new(2, &[BAD])));
    lined.wait_loaded("live", 2);
    let [mut good, mut bad]: [TlsClient; 2] = live.try_into().expect("two were opened");
    assert!(bad.ends_within(AT_ONCE), "its connection is closed");
    assert_eq!(good.ask("/"), Some(200), "the other is not");

    let [good, bad] = &clients;
    let (caller, status) = call(bad);
    assert_eq!(status, None, "resumed: {}", caller.is_resumed());
    assert_eq!(world.call(Who::Bad, port), REVOKED, "a whole handshake");
    let (caller, status) = call(good);
    assert_eq!(status, Some(200), "resumed: {}", caller.is_resumed());
    assert_eq!(world.call(Who::Good, port), LET_IN);
}

#[test]
fn half_a_million_entries_are_loaded_and_tell_two_clients_apart() {
    let world = World::new();
    let first = world.below(1, &CraftedCrl::new(1, &[]));
    let lined = Lined::start(world, &[("many", first)]);
    let (world, port) = (&lined.world, lined.port("many"));
    assert_eq!(world.call(Who::Bad, port), LET_IN);
    // The last one is whom it is about.
    let mut serials: Vec<u64> = (1..MOST_ENTRIES).map(|n| (1 << 40) + n).collect();
    serials.push(BAD);
    write(&lined.file("many"), &world.below(2, &CraftedCrl::new(2, &serials)));
    lined.wait_loaded("many", 2);
    assert_eq!(lined.sidecar.metric("weft_sidecar_revoked_certificates"), MOST_ENTRIES);
    assert_eq!(world.call(Who::Bad, port), REVOKED);
    assert_eq!(world.call(Who::Good, port), LET_IN);
}

#[test]
fn lists_that_are_removed_stay_in_force_until_others_are_put_there() {
    let world = World::new();
    let first = world.below(1, &CraftedCrl::new(1, &[BAD]));
    let lined = Lined::start(world, &[("gone", first)]);
    let (world, port) = (&lined.world, lined.port("gone"));
    let check = |good, bad| {
        assert_eq!(world.call(Who::Good, port), good);
        assert_eq!(world.call(Who::Bad, port), bad);
    };
    check(LET_IN, REVOKED);
    std::fs::remove_file(lined.file("gone")).expect("it is there");
    let told = lined.wait_refused("gone", "last good one stays in force");
    assert!(told.contains("No such file"), "{told}");
    check(LET_IN, REVOKED);
    write(&lined.file("gone"), &world.below(2, &CraftedCrl::new(2, &[GOOD, BAD])));
    lined.wait_loaded("gone", 2);
    check(REVOKED, REVOKED);
    // One that is older than what is in force takes nothing back.
    write(&lined.file("gone"), &world.below(1, &CraftedCrl::new(1, &[])));
    lined.wait_refused("gone", "is older than the one in force, which stays");
    check(REVOKED, REVOKED);
    write(&lined.file("gone"), &world.below(3, &CraftedCrl::new(3, &[])));
    lined.wait_loaded("gone", 3);
    check(LET_IN, LET_IN);
    assert_eq!(json!(problems(&lined.dump())), json!([]));
}
