//! Options that `weft agent`, `weft sidecar` and `weft sds` share.

use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use weft_model::{MissingReference, Snapshot, SpiffeId};
use weft_runtime::access::Writer;
use weft_runtime::admin::AdminConfig;
use weft_runtime::problems::Problems;
use weft_xds::bootstrap::Bootstrap;

use super::admin_ports::AdminPortArgs;
use super::{CommandError, print_line, values};
use crate::identity::{Enrolment, IdentitySource};

/// The options of every data plane.
#[derive(Debug, Args)]
pub(super) struct DataPlaneArgs {
    /// Envoy bootstrap file, YAML or JSON
    #[arg(short = 'c', long = "config", value_name = "FILE", required_unless_present = "control")]
    pub(super) config: Option<PathBuf>,
    /// Address of the control plane
    #[arg(
        long,
        env = "WEFT_CONTROL",
        value_name = "HOST:PORT",
        requires = "trust",
        conflicts_with = "config",
        value_parser = values::host_and_port
    )]
    pub(super) control: Option<String>,
    /// Trust bundle that verifies the control plane, PEM
    #[arg(long, env = "WEFT_TRUST", value_name = "FILE")]
    pub(super) trust: Option<PathBuf>,
    /// Join token for the first certificate
    #[arg(long, env = "WEFT_JOIN_TOKEN_FILE", value_name = "FILE")]
    join_token_file: Option<PathBuf>,
    /// Directory that stores the certificate and its key (mode 0600) across restarts
    #[arg(long, value_name = "DIRECTORY", conflicts_with = "config")]
    state: Option<PathBuf>,
    /// Listen address of the admin port [default with --control: 127.0.0.1:15000]
    #[arg(long, value_name = "ADDRESS")]
    admin: Option<SocketAddr>,
    #[command(flatten)]
    ports: AdminPortArgs,
    /// Number of worker threads [default: one per processor]
    #[arg(long, value_name = "COUNT", value_parser = values::workers)]
    pub(super) workers: Option<NonZeroUsize>,
    /// Grace period for in-flight connections on shutdown, in seconds
    #[arg(long, default_value_t = 30, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(0..=86_400))]
    drain_timeout: u64,
    /// Validate the configuration, print a summary and exit
    #[arg(long)]
    check_config: bool,
}

/// The options of a data plane after its files are read.
pub(super) struct DataPlaneOptions {
    pub(super) bootstrap: Bootstrap,
    pub(super) enrolment: Option<Enrolment>,
    pub(super) ports: AdminConfig,
    pub(super) grace_period: Duration,
}

impl DataPlaneArgs {
    /// Reads the files that the options name. Returns none after `--check-config` succeeded. `check` finds the parts of
    /// a configuration that this role cannot serve.
    pub(super) fn resolve(
        &self,
        identity: Option<SpiffeId>,
        check: impl Fn(&Snapshot) -> Problems,
    ) -> Result<Option<DataPlaneOptions>, CommandError> {
        let bootstrap = match &self.config {
            Some(file) => read(file)?,
            None => crate::configuration::bootstrap_for(identity.as_ref()),
        };
        let enrolment = match (&self.control, &self.trust, identity) {
            (Some(control), Some(trust), Some(identity)) => Some(Enrolment {
                control: control.clone(),
                roots: read_roots(trust)?,
                identity,
                source: IdentitySource {
                    token_file: self.join_token_file.clone(),
                    state: self.state.clone(),
                },
            }),
            _ => None,
        };
        if self.check_config {
            let resources = &bootstrap.resources;
            let uses_xds = bootstrap.ads.is_some() || enrolment.is_some();
            let problems = match uses_xds {
                true => check(&complete(resources)),
                false => check(resources),
            };
            problems.ready(false).map_err(|_| CommandError::Usage(self.in_file(&problems)))?;
            print_line(&format!(
                "configuration is valid: {} listeners, {} clusters, {} secrets{}",
                resources.listeners.len(),
                resources.clusters.len(),
                resources.secrets.len(),
                if uses_xds { ", and more over xDS" } else { "" }
            ));
            for warning in &problems.warnings {
                print_line(&format!("warning: {warning}"));
            }
            for path in &bootstrap.notes.not_honoured {
                print_line(&format!("not honoured: {path}"));
            }
            for warning in &bootstrap.notes.warnings {
                print_line(&format!("warning: {warning}"));
            }
            return Ok(None);
        }
        let default = enrolment.as_ref().map(|_| SocketAddr::from(([127, 0, 0, 1], 15000)));
        let admin = self.admin.or(bootstrap.admin).or(default);
        Ok(Some(DataPlaneOptions {
            bootstrap,
            enrolment,
            ports: self.ports.with(admin),
            grace_period: Duration::from_secs(self.drain_timeout),
        }))
    }
}

impl DataPlaneArgs {
    /// One line per problem, with the file name.
    fn in_file(&self, problems: &Problems) -> String {
        let file = self.config.as_ref().map(|file| file.display().to_string()).unwrap_or_default();
        let lines = problems.unserved.iter().chain(&problems.unreachable);
        let lines: Vec<String> = lines.map(|problem| format!("{file}: {problem}")).collect();
        lines.join("\n")
    }
}

/// The resources of a file that do not depend on resources received over xDS.
fn complete(resources: &Snapshot) -> Snapshot {
    let mut complete = resources.clone();
    let lacks_secrets = |mut missing: Vec<MissingReference>| {
        missing.drain(..).any(|m| matches!(m, MissingReference::Secret(_)))
    };
    complete.listeners.retain(|_, listener| {
        let has_keys = |name| resources.clusters.contains_key(name);
        listener.key_cluster_names().all(has_keys)
            && resources.missing_secrets(listener.secret_names()).next().is_none()
    });
    complete.clusters.retain(|_, c| !lacks_secrets(resources.missing_of_cluster(c)));
    complete
}

/// Options that name the workload.
#[derive(Debug, Args)]
pub(super) struct WorkloadArgs {
    /// Service of this workload; its SPIFFE ID is spiffe://TRUST_DOMAIN/ns/default/sa/SERVICE
    #[arg(
        long,
        value_name = "NAME",
        required_unless_present = "config",
        conflicts_with = "config"
    )]
    service: Option<String>,
    /// Trust domain of the mesh
    #[arg(long, default_value = "mesh.local", value_name = "NAME", conflicts_with = "config")]
    trust_domain: String,
}

impl WorkloadArgs {
    /// The SPIFFE ID of the workload; none without `--service`.
    ///
    /// # Errors
    /// The service or the trust domain is not valid in a SPIFFE ID.
    pub(super) fn identity(&self) -> Result<Option<SpiffeId>, CommandError> {
        let identity = |service| weft_control::mesh::identity(&self.trust_domain, service);
        let identity = self.service.as_deref().map(identity).transpose();
        identity
            .map_err(|error| CommandError::Usage(format!("--service and --trust-domain: {error}")))
    }
}

/// Starts the writer of the access log.
pub(super) fn access_writer() -> Result<Writer, CommandError> {
    let writer = Writer::start();
    writer.map_err(|error| CommandError::Failed(format!("cannot start the access log: {error}")))
}

/// Reads the trust bundle for the control plane. A file without a certificate is refused: no control plane could be
/// verified, and the process would retry without end.
fn read_roots(file: &Path) -> Result<Vec<u8>, CommandError> {
    let refuse = |why: String| CommandError::Usage(format!("--trust {}: {why}", file.display()));
    let bytes = std::fs::read(file).map_err(|error| refuse(error.to_string()))?;
    let roots: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    match roots {
        Ok(roots) if !roots.is_empty() => Ok(bytes),
        Ok(_) => Err(refuse("no certificate: must hold root certificates, PEM".to_owned())),
        Err(error) => Err(refuse(error.to_string())),
    }
}

fn read(file: &PathBuf) -> Result<Bootstrap, CommandError> {
    let text = std::fs::read_to_string(file)
        .map_err(|e| CommandError::Usage(format!("{}: {e}", file.display())))?;
    Bootstrap::parse(&text).map_err(|problems| {
        let lines: Vec<String> =
            problems.iter().map(|problem| format!("{}: {problem}", file.display())).collect();
        CommandError::Usage(lines.join("\n"))
    })
}
