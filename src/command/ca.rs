//! `weft ca`.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};
use weft_runtime::clock::wall_clock;

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
use super::{CommandError, print_line};

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    weft ca init --state /var/lib/weft --trust-domain mesh.local --trust-file root.pem\n  \
    weft ca token --state /var/lib/weft spiffe://mesh.local/ns/default/sa/web > token\n  \
    weft ca issue --state /var/lib/weft spiffe://mesh.local/ns/default/sa/me --out me\n  \
    weft ca revoke --state /var/lib/weft 5f0c...\n  \
    weft ca rotate --state /var/lib/weft root\n  \
    weft ca init --state /var/lib/weft --root root.pem --certificate mesh.pem --key mesh.key --root-lists root.crl\n  \
    weft ca coverage --roots root.pem --lists revoked.pem")]
pub(super) struct CaArgs {
    #[command(subcommand)]
    command: CaCommand,
}

#[derive(Debug, Args)]
struct StateArgs {
    /// State directory of the certificate authority
    #[arg(long, value_name = "DIRECTORY")]
    state: PathBuf,
}

/// The files of an intermediate CA that an external root has signed.
#[derive(Debug, Args)]
#[group(requires_all = ["root", "certificate", "key"])]
struct ExternalCaArgs {
    /// Certificate of the external root CA, PEM
    #[arg(long, value_name = "FILE", required = false)]
    root: PathBuf,
    /// Certificate of this mesh's intermediate CA, PEM, followed by the intermediates up to the root
    #[arg(long, value_name = "FILE", required = false)]
    certificate: PathBuf,
    /// Private key of the intermediate CA, PEM (PKCS #8); stored in the state directory
    #[arg(long, value_name = "FILE", required = false)]
    key: PathBuf,
    /// CRLs of the root and of the intermediates above this one, PEM. Without them sidecars reject every certificate,
    /// unless mesh.yaml sets `security.revocation: {depth: leaf}`
    #[arg(long, value_name = "FILE")]
    root_lists: Option<PathBuf>,
}

impl ExternalCaArgs {
    fn read(&self) -> Result<ExternalCaFiles, CommandError> {
        let read = |file: &Path| {
            std::fs::read_to_string(file)
                .map_err(|error| CommandError::Failed(format!("{}: {error}", file.display())))
        };
        let lists = self.root_lists.as_deref().map(read).transpose()?.unwrap_or_default();
        let root = read(&self.root)?;
        let certificate = read(&self.certificate)?;
        Ok(ExternalCaFiles { root, certificate, key: read(&self.key)?.into(), crls: lists })
    }
}

#[derive(Debug, Subcommand)]
enum CaCommand {
    /// Create a certificate authority, with its own root or below an external root
    Init {
        #[command(flatten)]
        state: StateArgs,
        #[command(flatten)]
        external: Option<ExternalCaArgs>,
        /// Trust domain of the SPIFFE IDs that it signs
        #[arg(long, default_value = "mesh.local", value_name = "NAME")]
        trust_domain: String,
        /// Also write the root certificate to this file
        #[arg(long, value_name = "FILE")]
        trust_file: Option<PathBuf>,
    },
    /// Issue a certificate and key: PREFIX.pem and PREFIX.key
    Issue {
        #[command(flatten)]
        state: StateArgs,
        /// SPIFFE ID
        identity: String,
        /// Path prefix of the two files
        #[arg(long, value_name = "PREFIX")]
        out: PathBuf,
        /// Validity, in hours
        #[arg(long, default_value_t = 24, value_name = "HOURS", value_parser = clap::value_parser!(u64).range(1..=24 * 90))]
        hours: u64,
    },
    /// Create a single-use join token for one identity, valid for one hour
    Token {
        #[command(flatten)]
        state: StateArgs,
        /// SPIFFE ID
        identity: String,
    },
    /// Revoke certificates; a running control plane publishes the new CRL immediately
    Revoke {
        #[command(flatten)]
        state: StateArgs,
        /// Serial number (hex, as in `weft ca list`), SPIFFE ID or service. A SPIFFE ID or service revokes all its
        /// unexpired certificates
        #[arg(required = true, value_name = "SERIAL|ID|SERVICE")]
        targets: Vec<String>,
    },
    /// Print the CRLs, PEM, and a summary on standard error
    Crl {
        #[command(flatten)]
        state: StateArgs,
    },
    /// Show which issuers have a valid CRL; in strict mode sidecars reject certificates of all other issuers.
    /// Exit code 1 when an issuer has none
    Coverage {
        /// Trust bundle, PEM
        #[arg(long, value_name = "FILE")]
        roots: PathBuf,
        /// CRLs, PEM or DER
        #[arg(long, value_name = "FILE")]
        lists: PathBuf,
        /// Additional certificates of intermediate CAs, PEM
        #[arg(long, value_name = "FILE")]
        intermediates: Option<PathBuf>,
    },
    /// Rotate the certificate authority without interruption.
    ///
    /// Three steps: the new CA is announced in the trust bundle, then it signs, then the former CA is removed from the
    /// trust bundle. The control plane takes each step once no certificate depends on the previous one, which takes the
    /// lifetime of a certificate. `next` takes the step now, if every identity with a certificate has received the new
    /// trust bundle (for workloads that share an identity: those connected). Removing a root with `next` closes
    /// the connections that its certificates opened; the automatic step waits one more hour.
    Rotate {
        #[command(flatten)]
        state: StateArgs,
        /// root: announce a CA with a new root; intermediate: announce a new intermediate below the same root; next: take
        /// the next step now; status: print the state of the rotation
        #[arg(value_parser = step, required_unless_present = "root", conflicts_with = "ExternalCaArgs")]
        step: Option<RotationStep>,
        #[command(flatten)]
        external: Option<ExternalCaArgs>,
    },
    /// Replace the CRLs of an external root and of the intermediates below it
    RootLists {
        #[command(flatten)]
        state: StateArgs,
        /// CRLs, PEM
        #[arg(value_name = "FILE")]
        lists: PathBuf,
    },
    /// Print the trust bundle, PEM, for the --trust option of new workloads
    Roots {
        #[command(flatten)]
        state: StateArgs,
    },
    /// Verify the CA store and its backups (read-only) and print a summary. Exit code 1 when a file is damaged or there is
    /// no backup
    Check {
        #[command(flatten)]
        state: StateArgs,
    },
    /// List issued certificates: serial number, state, times of issue, expiry and revocation, SPIFFE ID
    List {
        #[command(flatten)]
        state: StateArgs,
    },
}

pub(super) fn run(arguments: CaArgs) -> Result<(), CommandError> {
    match arguments.command {
        CaCommand::Init { state, external, trust_domain, trust_file } => {
            init(&state.state, external.as_ref(), &trust_domain, trust_file.as_deref())
        }
        CaCommand::Issue { state, identity, out, hours } => {
            issue(&state.state, &identity, &out, Duration::from_secs(hours * 3600))
        }
        CaCommand::Token { state, identity } => {
            execute(&state.state, &AdminCommand::Token(parse(&identity)?.to_string()))
        }
        CaCommand::Revoke { state, targets } => {
            execute(&state.state, &AdminCommand::Revoke(targets))
        }
        CaCommand::Crl { state } => crl(&state.state),
        CaCommand::Check { state } => {
            let lines = admin_socket::check_store(&state.state).map_err(CommandError::Failed)?;
            lines.iter().for_each(|line| print_line(line));
            Ok(())
        }
        CaCommand::List { state } => execute(&state.state, &AdminCommand::List),
        CaCommand::Rotate { state, external: Some(external), .. } => {
            let ExternalCaFiles { root, certificate, key, crls } = external.read()?;
            let key = PrivateKey(key.to_string());
            execute(&state.state, &AdminCommand::RotateToExternal { root, certificate, key, crls })
        }
        CaCommand::Rotate { state, step, external: None } => {
            execute(&state.state, &AdminCommand::Rotate(step.unwrap_or(RotationStep::Status)))
        }
        CaCommand::RootLists { state, lists } => {
            let text = std::fs::read_to_string(&lists)
                .map_err(|error| CommandError::Failed(format!("{}: {error}", lists.display())))?;
            execute(&state.state, &AdminCommand::RootCrls(text))
        }
        CaCommand::Roots { state } => execute(&state.state, &AdminCommand::Roots),
        CaCommand::Coverage { roots, lists, intermediates } => {
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
        _ => Err("must be root, intermediate, next or status".into()),
    }
}

fn coverage(roots: &Path, lists: &Path, intermediates: Option<&Path>) -> Result<(), CommandError> {
    let read = |file: &Path| {
        std::fs::read(file)
            .map_err(|error| CommandError::Failed(format!("{}: {error}", file.display())))
    };
    let certificates = |file: &Path, bytes: &[u8]| {
        let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(bytes).collect();
        all.map_err(|error| CommandError::Failed(format!("{}: {error}", file.display())))
    };
    let roots = certificates(roots, &read(roots)?)?;
    let bytes = read(lists)?;
    let since_1970 = wall_clock().duration_since(UNIX_EPOCH).unwrap_or_default();
    let now = UnixTime::since_unix_epoch(since_1970);
    // The command checks what the CRLs cover, not the limits of mesh.yaml.
    let unlimited = RevocationPolicy {
        entries_limit: usize::MAX,
        bytes_limit: usize::MAX,
        ..RevocationPolicy::default()
    };
    // A file of DER CRLs holds no certificates.
    let mut beside = certificates(lists, &bytes).unwrap_or_default();
    if let Some(file) = intermediates {
        beside.extend(certificates(file, &read(file)?)?);
    }
    let signers = CrlSigners { roots: &roots, intermediates: &beside, seen: &[] };
    let index = CrlIndex::load(&bytes, &signers, None, &unlimited, now).map_err(|errors| {
        let errors: Vec<String> = errors.iter().map(ToString::to_string).collect();
        CommandError::Failed(format!("{}: {}", lists.display(), errors.join("; ")))
    })?;
    index.warnings().iter().for_each(|warning| print_line(&format!("note     {warning}")));
    let mut missing = 0;
    for coverage in index.issuer_coverage(&roots, &beside, now) {
        let (word, what) = match (coverage.leaves, coverage.authorities, coverage.next_update) {
            (true, true, _) => ("covered", "leaf and CA certificates".to_owned()),
            (true, false, _) => ("partly", "leaf certificates only".to_owned()),
            (false, true, _) => ("partly", "CA certificates only".to_owned()),
            (false, false, Some(end)) if end <= now => ("expired", date(end)),
            (false, false, Some(_)) => {
                ("partly", "only certificates of a distribution point".to_owned())
            }
            (false, false, None) => ("missing", "no CRL".to_owned()),
        };
        missing += usize::from(word == "missing" || word == "expired");
        let until = coverage.next_update.map(|end| format!(", valid until {}", date(end)));
        let until = until.filter(|_| word != "expired").unwrap_or_default();
        print_line(&format!("{word:8} {}: {what}{until}", coverage.issuer));
    }
    match missing {
        0 => Ok(()),
        1 => Err(CommandError::Failed(
            "1 issuer has no valid CRL: strict mode rejects its certificates".into(),
        )),
        _ => Err(CommandError::Failed(format!(
            "{missing} issuers have no valid CRL: strict mode rejects their certificates"
        ))),
    }
}

fn date(time: UnixTime) -> String {
    let seconds = time.as_secs();
    let at = i64::try_from(seconds).ok().and_then(|s| OffsetDateTime::from_unix_timestamp(s).ok());
    at.and_then(|at| at.format(&Rfc3339).ok()).unwrap_or_else(|| seconds.to_string())
}

fn init(
    state: &Path,
    external: Option<&ExternalCaArgs>,
    trust_domain: &str,
    trust_file: Option<&Path>,
) -> Result<(), CommandError> {
    let files = match external {
        Some(external) => external.read()?.into_authority(trust_domain, wall_clock()),
        None => Authority::create(trust_domain, wall_clock()),
    };
    let files = files.map_err(failed)?;
    let store = Store::create(state, trust_domain, &files).map_err(failed)?;
    if let Some(file) = trust_file {
        std::fs::write(file, &files.root_certificate).map_err(|error| {
            CommandError::Failed(format!(
                "{}: {error}; the certificate authority of {trust_domain} was created: weft ca roots --state {} prints its root",
                file.display(),
                state.display()
            ))
        })?;
    }
    if matches!(&files.root, RootSigner::External { crls } if crls.is_empty()) {
        print_line(
            "note: without --root-lists sidecars reject every certificate, unless mesh.yaml sets \
             security.revocation: {depth: leaf}",
        );
    }
    print_line(&format!(
        "created the certificate authority of {trust_domain} in {}",
        store.path().display()
    ));
    Ok(())
}

fn issue(state: &Path, identity: &str, out: &Path, life: Duration) -> Result<(), CommandError> {
    let store = open(state)?;
    let identity = parse(identity)?;
    check_trust_domain(&store, &identity).map_err(CommandError::Usage)?;
    // Both files are created first: a certificate whose files cannot be written could only be revoked.
    let mut key = OutputFile::create(with_suffix(out, ".key"), 0o600)?;
    let mut certificate = OutputFile::create(with_suffix(out, ".pem"), 0o644)?;
    let issued = issue_locally(&store, &identity, life, wall_clock())?;
    key.write(&issued.key)?;
    certificate.write(&issued.issued.chain.concat())?;
    let [pem, private] = [&certificate, &key].map(|file| file.path().display().to_string());
    key.keep();
    certificate.keep();
    print_line(&format!("{} {pem} {private}", issued.issued.serial));
    Ok(())
}

/// The path of a file whose name is a prefix and a suffix.
fn with_suffix(prefix: &Path, suffix: &str) -> PathBuf {
    let mut path = prefix.as_os_str().to_owned();
    path.push(suffix);
    path.into()
}

fn crl(state: &Path) -> Result<(), CommandError> {
    let store = open(state)?;
    let crls = admin_socket::sign_crls(&store, wall_clock()).map_err(CommandError::Failed)?;
    for line in describe_crl(&crls) {
        // Standard error may be closed; standard output gets the CRLs.
        drop(writeln!(std::io::stderr(), "{line}"));
    }
    print_line(crls.trim_end());
    Ok(())
}

/// Runs an admin command on the store, or sends it to the control plane when that has the store open.
fn execute(state: &Path, command: &AdminCommand) -> Result<(), CommandError> {
    let outcome = match Store::open(state) {
        Ok(store) => {
            if let AdminCommand::Token(identity) = command {
                check_trust_domain(&store, &parse(identity)?).map_err(CommandError::Usage)?;
            }
            admin_socket::execute(&store, command)
        }
        Err(StoreError::InUse(_)) => admin_socket::send(state, command),
        Err(error) => return Err(failed(error)),
    };
    outcome.map_err(CommandError::Failed)?.iter().for_each(|line| print_line(line));
    Ok(())
}

fn open(state: &Path) -> Result<Store, CommandError> {
    Store::open(state).map_err(failed)
}

fn parse(identity: &str) -> Result<SpiffeId, CommandError> {
    SpiffeId::parse(identity).map_err(|error| CommandError::Usage(error.to_string()))
}

fn failed(error: impl std::error::Error) -> CommandError {
    CommandError::Failed(error.to_string())
}
