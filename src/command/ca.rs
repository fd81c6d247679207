//! `weft ca`.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::{Args, Subcommand};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, UnixTime};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use weft_certs::{Authority, CrlIndex, CrlSigners, ExternalCaFiles, RootSigner, describe_crl};
use weft_control::admin_socket::{self, AdminCommand, PrivateKey};
use weft_control::ca_rotation::RotationStep;
use weft_control::issue::{check_trust_domain, issue_locally};
use weft_control::store::{Store, StoreError};
use weft_model::{RevocationPolicy, SpiffeId};

use super::output_file::OutputFile;
use super::{Failure, say};

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    weft ca init --state /var/lib/weft --trust-domain mesh.local --trust-file root.pem\n  \
    weft ca token --state /var/lib/weft spiffe://mesh.local/ns/default/sa/web > token\n  \
    weft ca issue --state /var/lib/weft spiffe://mesh.local/ns/default/sa/me --out me\n  \
    weft ca revoke --state /var/lib/weft 5f0c...\n  \
    weft ca rotate --state /var/lib/weft root\n  \
    weft ca init --state /var/lib/weft --root root.pem --certificate mesh.pem --key mesh.key --root-lists root.crl\n  \
    weft ca coverage --roots root.pem --lists revoked.pem")]
pub(super) struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Args)]
struct State {
    /// The folder of the authority.
    #[arg(long, value_name = "FOLDER")]
    state: PathBuf,
}

/// An authority that somebody else's root has signed.
#[derive(Debug, Args)]
#[group(requires_all = ["root", "certificate", "key"])]
struct GivenFiles {
    /// The certificate of somebody else's root, PEM, which has signed ours.
    #[arg(long, value_name = "FILE", required = false)]
    root: PathBuf,
    /// The certificate of ours, PEM; those between the two behind it.
    #[arg(long, value_name = "FILE", required = false)]
    certificate: PathBuf,
    /// The key of ours, PEM (PKCS #8). It is kept in the folder of the authority.
    #[arg(long, value_name = "FILE", required = false)]
    key: PathBuf,
    /// The revocation lists of the root and of those between, PEM. Without them sidecars take nobody's
    /// certificate, unless mesh.yaml says `security.revocation: {depth: leaf}`.
    #[arg(long, value_name = "FILE")]
    root_lists: Option<PathBuf>,
}

impl GivenFiles {
    fn read(&self) -> Result<ExternalCaFiles, Failure> {
        let read = |file: &Path| {
            std::fs::read_to_string(file)
                .map_err(|error| Failure::Failed(format!("{}: {error}", file.display())))
        };
        let lists = self.root_lists.as_deref().map(read).transpose()?.unwrap_or_default();
        let (root, certificate) = (read(&self.root)?, read(&self.certificate)?);
        Ok(ExternalCaFiles { root, certificate, key: read(&self.key)?.into(), lists })
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make an authority: with a root of its own, or below somebody else's.
    Init {
        #[command(flatten)]
        state: State,
        #[command(flatten)]
        given: Option<GivenFiles>,
        /// The trust domain of every identity.
        #[arg(long, default_value = "mesh.local", value_name = "NAME")]
        trust_domain: String,
        /// Where to write the root certificate as well.
        #[arg(long, value_name = "FILE")]
        trust_file: Option<PathBuf>,
    },
    /// Make a key and a certificate: PREFIX.pem and PREFIX.key.
    Issue {
        #[command(flatten)]
        state: State,
        /// The SPIFFE id.
        identity: String,
        /// Where to write them.
        #[arg(long, value_name = "PREFIX")]
        out: PathBuf,
        /// How long it is good, in hours.
        #[arg(long, default_value_t = 24, value_name = "HOURS", value_parser = clap::value_parser!(u64).range(1..=24 * 90))]
        hours: u64,
    },
    /// Make a join token, good once, for an hour, and for one identity.
    Token {
        #[command(flatten)]
        state: State,
        /// The SPIFFE id.
        identity: String,
    },
    /// Revoke certificates. A control plane that runs on the authority publishes it at once.
    Revoke {
        #[command(flatten)]
        state: State,
        /// Serial numbers, hex, as `weft ca list` shows them; SPIFFE ids; or services: of the latter two all
        /// certificates that are still good.
        #[arg(required = true, value_name = "SERIAL|ID|SERVICE")]
        targets: Vec<String>,
    },
    /// Print the revocation lists, PEM, and what they hold on standard error.
    Crl {
        #[command(flatten)]
        state: State,
    },
    /// Tell which issuers the revocation lists speak for: in strict mode nobody else's certificates are
    /// taken. Exit code 1 when one has none.
    Coverage {
        /// The roots, PEM.
        #[arg(long, value_name = "FILE")]
        roots: PathBuf,
        /// The revocation lists, PEM or DER.
        #[arg(long, value_name = "FILE")]
        lists: PathBuf,
        /// Certificates of intermediate authorities, PEM, beside those in the file of lists.
        #[arg(long, value_name = "FILE")]
        intermediates: Option<PathBuf>,
    },
    /// Have one authority follow another without anybody noticing: it is announced, then signs, then the
    /// former one is taken back. Each step comes by itself when nothing depends on the one before any more,
    /// which takes as long as certificates live; or at once by `next`, when all services that have a
    /// certificate know it (of replicas, which share one identity, those that are connected). By `next`, a
    /// root that is taken back ends the connections that were begun by its certificates; by itself that
    /// comes an hour later, when they have ended.
    Rotate {
        #[command(flatten)]
        state: State,
        /// root: announce an authority with a new root; intermediate: with the same root; next: take the next
        /// step now; status: tell how it stands.
        #[arg(value_parser = step, required_unless_present = "root", conflicts_with = "GivenFiles")]
        step: Option<RotationStep>,
        #[command(flatten)]
        given: Option<GivenFiles>,
    },
    /// Replace the revocation lists of somebody else's root, and of those between it and ours.
    RootLists {
        #[command(flatten)]
        state: State,
        /// The lists, PEM.
        #[arg(value_name = "FILE")]
        lists: PathBuf,
    },
    /// Print the roots that are trusted, PEM: for new workloads, by --trust.
    Roots {
        #[command(flatten)]
        state: State,
    },
    /// Verify the store of the authority and its backups, and print what they hold. Nothing is changed. Exit
    /// code 1 when one is damaged, or there is no backup.
    Check {
        #[command(flatten)]
        state: State,
    },
    /// List the certificates that were issued: serial number, state, dates of issue, expiry and revocation, id.
    List {
        #[command(flatten)]
        state: State,
    },
}

pub(super) fn run(arguments: Arguments) -> Result<(), Failure> {
    match arguments.command {
        Command::Init { state, given, trust_domain, trust_file } => {
            init(&state.state, given.as_ref(), &trust_domain, trust_file.as_deref())
        }
        Command::Issue { state, identity, out, hours } => {
            issue(&state.state, &identity, &out, Duration::from_secs(hours * 3600))
        }
        Command::Token { state, identity } => {
            order(&state.state, &AdminCommand::Token(parse(&identity)?.to_string()))
        }
        Command::Revoke { state, targets } => order(&state.state, &AdminCommand::Revoke(targets)),
        Command::Crl { state } => crl(&state.state),
        Command::Check { state } => {
            let lines = admin_socket::check_store(&state.state).map_err(Failure::Failed)?;
            lines.iter().for_each(|line| say(line));
            Ok(())
        }
        Command::List { state } => order(&state.state, &AdminCommand::List),
        Command::Rotate { state, given: Some(given), .. } => {
            let ExternalCaFiles { root, certificate, key, lists } = given.read()?;
            let key = PrivateKey(key.to_string());
            order(&state.state, &AdminCommand::Follow { root, certificate, key, lists })
        }
        Command::Rotate { state, step, given: None } => {
            order(&state.state, &AdminCommand::Rotate(step.unwrap_or(RotationStep::Status)))
        }
        Command::RootLists { state, lists } => {
            let text = std::fs::read_to_string(&lists)
                .map_err(|error| Failure::Failed(format!("{}: {error}", lists.display())))?;
            order(&state.state, &AdminCommand::RootCrls(text))
        }
        Command::Roots { state } => order(&state.state, &AdminCommand::Roots),
        Command::Coverage { roots, lists, intermediates } => {
            coverage(&roots, &lists, intermediates.as_deref())
        }
    }
}

fn step(word: &str) -> Result<RotationStep, String> {
    match word {
        "root" => Ok(RotationStep::Root),
        "intermediate" => Ok(RotationStep::Intermediate),
        "next" => Ok(RotationStep::Next),
        "status" => Ok(RotationStep::Status),
        _ => Err("root, intermediate, next and status are".into()),
    }
}

fn coverage(roots: &Path, lists: &Path, intermediates: Option<&Path>) -> Result<(), Failure> {
    let read = |file: &Path| {
        std::fs::read(file).map_err(|error| Failure::Failed(format!("{}: {error}", file.display())))
    };
    let certificates = |file: &Path, bytes: &[u8]| {
        let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(bytes).collect();
        all.map_err(|error| Failure::Failed(format!("{}: {error}", file.display())))
    };
    let roots = certificates(roots, &read(roots)?)?;
    let bytes = read(lists)?;
    let since_1970 = wall_clock().duration_since(UNIX_EPOCH).unwrap_or_default();
    let now = UnixTime::since_unix_epoch(since_1970);
    // Whether they fit is another matter than what they say.
    let unlimited = RevocationPolicy {
        entries_limit: usize::MAX,
        bytes_limit: usize::MAX,
        ..RevocationPolicy::default()
    };
    // A file of lists in DER holds no certificates.
    let mut beside = certificates(lists, &bytes).unwrap_or_default();
    if let Some(file) = intermediates {
        beside.extend(certificates(file, &read(file)?)?);
    }
    let signers = CrlSigners { roots: &roots, intermediates: &beside, seen: &[] };
    let index = CrlIndex::load(&bytes, &signers, None, &unlimited, now).map_err(|errors| {
        let errors: Vec<String> = errors.iter().map(ToString::to_string).collect();
        Failure::Failed(format!("{}: {}", lists.display(), errors.join("; ")))
    })?;
    index.warnings().iter().for_each(|warning| say(&format!("note     {warning}")));
    let mut missing = 0;
    for covers in index.issuer_coverage(&roots, &beside, now) {
        let (word, what) = match (covers.leaves, covers.authorities, covers.next_update) {
            (true, true, _) => ("covered", "leaves and authorities".to_owned()),
            (true, false, _) => ("partly", "leaves, and no authorities".to_owned()),
            (false, true, _) => ("partly", "authorities, and no leaves".to_owned()),
            (false, false, Some(end)) if end <= now.as_secs() => ("expired", date(end)),
            (false, false, Some(_)) => ("partly", "only those of a distribution point".to_owned()),
            (false, false, None) => ("missing", "there is no list".to_owned()),
        };
        missing += usize::from(word == "missing" || word == "expired");
        let until = covers.next_update.map(|end| format!(", good until {}", date(end)));
        let until = until.filter(|_| word != "expired").unwrap_or_default();
        say(&format!("{word:8} {}: {what}{until}", covers.issuer));
    }
    match missing {
        0 => Ok(()),
        1 => {
            Err(Failure::Failed("an issuer has no list: strict mode refuses what it signed".into()))
        }
        _ => Err(Failure::Failed(format!(
            "{missing} issuers have no list: strict mode refuses what they signed"
        ))),
    }
}

fn date(seconds: u64) -> String {
    let at = i64::try_from(seconds).ok().and_then(|s| OffsetDateTime::from_unix_timestamp(s).ok());
    at.and_then(|at| at.format(&Rfc3339).ok()).unwrap_or_else(|| seconds.to_string())
}

fn init(
    state: &Path,
    given: Option<&GivenFiles>,
    trust_domain: &str,
    trust_file: Option<&Path>,
) -> Result<(), Failure> {
    let files = match given {
        Some(given) => given.read()?.into_authority(trust_domain, wall_clock()),
        None => Authority::create(trust_domain, wall_clock()),
    };
    let files = files.map_err(failed)?;
    let store = Store::create(state, trust_domain, &files).map_err(failed)?;
    if let Some(file) = trust_file {
        std::fs::write(file, &files.root_certificate).map_err(|error| {
            Failure::Failed(format!(
                "{}: {error}; the authority of {trust_domain} was made, weft ca roots --state {} prints its root",
                file.display(),
                state.display()
            ))
        })?;
    }
    if matches!(&files.root, RootSigner::External { crls } if crls.is_empty()) {
        say(
            "note: without --root-lists sidecars take nobody's certificate, unless mesh.yaml says \
             security.revocation: {depth: leaf}",
        );
    }
    say(&format!("made the authority of {trust_domain} in {}", store.path().display()));
    Ok(())
}

fn issue(state: &Path, identity: &str, out: &Path, life: Duration) -> Result<(), Failure> {
    let store = open(state)?;
    let identity = parse(identity)?;
    check_trust_domain(&store, &identity).map_err(Failure::Usage)?;
    // Both before the certificate is issued: without its files it could only be revoked.
    let mut key = OutputFile::create(with_suffix(out, ".key"), 0o600)?;
    let mut certificate = OutputFile::create(with_suffix(out, ".pem"), 0o644)?;
    let made = issue_locally(&store, &identity, life, wall_clock())?;
    key.write(&made.key)?;
    certificate.write(&made.issued.chain.concat())?;
    let [pem, private] = [&certificate, &key].map(|file| file.path().display().to_string());
    key.keep();
    certificate.keep();
    say(&format!("{} {pem} {private}", made.issued.serial));
    Ok(())
}

/// The path of a file whose name is a prefix and a suffix.
fn with_suffix(prefix: &Path, suffix: &str) -> PathBuf {
    let mut path = prefix.as_os_str().to_owned();
    path.push(suffix);
    path.into()
}

fn crl(state: &Path) -> Result<(), Failure> {
    let store = open(state)?;
    let lists = admin_socket::sign_crls(&store, wall_clock()).map_err(Failure::Failed)?;
    for line in describe_crl(&lists) {
        // Standard error may be closed; the lists matter.
        drop(writeln!(std::io::stderr(), "{line}"));
    }
    say(lists.trim_end());
    Ok(())
}

/// Has an order carried out: by ourselves, or by the control plane that has the store open.
fn order(state: &Path, order: &AdminCommand) -> Result<(), Failure> {
    let outcome = match Store::open(state) {
        Ok(store) => {
            if let AdminCommand::Token(identity) = order {
                check_trust_domain(&store, &parse(identity)?).map_err(Failure::Usage)?;
            }
            admin_socket::execute(&store, order)
        }
        Err(StoreError::InUse(_)) => admin_socket::send(state, order),
        Err(error) => return Err(failed(error)),
    };
    outcome.map_err(Failure::Failed)?.iter().for_each(|line| say(line));
    Ok(())
}

fn open(state: &Path) -> Result<Store, Failure> {
    Store::open(state).map_err(failed)
}

fn parse(identity: &str) -> Result<SpiffeId, Failure> {
    SpiffeId::parse(identity).map_err(|error| Failure::Usage(error.to_string()))
}

#[allow(clippy::needless_pass_by_value, reason = "handed over by map_err")]
fn failed(error: impl std::error::Error) -> Failure {
    Failure::Failed(error.to_string())
}

#[allow(clippy::disallowed_methods, reason = "the edge where this crate's clock is read")]
fn wall_clock() -> SystemTime {
    SystemTime::now()
}
