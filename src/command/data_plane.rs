//! What `agent`, `sidecar` and `sds` are asked alike.

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

use super::admin_ports::AdminPorts;
use super::{Failure, say, values};
use crate::identity::{Enrolment, Source};

/// What both data planes are asked.
#[derive(Debug, Args)]
pub(super) struct DataPlane {
    /// An Envoy bootstrap file, YAML or JSON.
    #[arg(short = 'c', long = "config", value_name = "FILE", required_unless_present = "control")]
    pub(super) config: Option<PathBuf>,
    /// The control plane: HOST:PORT.
    #[arg(
        long,
        env = "WEFT_CONTROL",
        value_name = "HOST:PORT",
        requires = "trust",
        conflicts_with = "config",
        value_parser = values::host_and_port
    )]
    pub(super) control: Option<String>,
    /// The roots by which the control plane is known, PEM.
    #[arg(long, env = "WEFT_TRUST", value_name = "FILE")]
    pub(super) trust: Option<PathBuf>,
    /// The join token for a first certificate.
    #[arg(long, env = "WEFT_JOIN_TOKEN_FILE", value_name = "FILE")]
    join_token_file: Option<PathBuf>,
    /// Where the certificate and its key are kept over a restart, mode 0600.
    #[arg(long, value_name = "FOLDER", conflicts_with = "config")]
    state: Option<PathBuf>,
    /// Where the admin port listens. With --control: 127.0.0.1:15000 when not given.
    #[arg(long, value_name = "ADDRESS")]
    admin: Option<SocketAddr>,
    #[command(flatten)]
    ports: AdminPorts,
    /// How many worker threads; one per processor when not given.
    #[arg(long, value_name = "COUNT", value_parser = values::workers)]
    pub(super) workers: Option<NonZeroUsize>,
    /// How long draining waits for what is open, in seconds.
    #[arg(long, default_value_t = 30, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(0..=86_400))]
    drain_timeout: u64,
    /// Check the configuration, print what it is, and end.
    #[arg(long)]
    check_config: bool,
}

/// What was asked, understood.
pub(super) struct Understood {
    pub(super) bootstrap: Bootstrap,
    pub(super) enrolment: Option<Enrolment>,
    pub(super) ports: AdminConfig,
    pub(super) patience: Duration,
}

impl DataPlane {
    /// Reads the files that are named. None when only a check was asked for, which passed. `check` finds
    /// what of a configuration this role would not serve.
    pub(super) fn understand(
        &self,
        identity: Option<SpiffeId>,
        check: impl Fn(&Snapshot) -> Problems,
    ) -> Result<Option<Understood>, Failure> {
        let bootstrap = match &self.config {
            Some(file) => read(file)?,
            None => crate::configuration::bootstrap_for(identity.as_ref()),
        };
        let enrolment = match (&self.control, &self.trust, identity) {
            (Some(control), Some(trust), Some(identity)) => Some(Enrolment {
                control: control.clone(),
                roots: read_roots(trust)?,
                identity,
                source: Source {
                    token_file: self.join_token_file.clone(),
                    state: self.state.clone(),
                },
            }),
            _ => None,
        };
        if self.check_config {
            let resources = &bootstrap.resources;
            let comes_by_xds = bootstrap.ads.is_some() || enrolment.is_some();
            let problems = match comes_by_xds {
                true => check(&complete(resources)),
                false => check(resources),
            };
            problems.ready(false).map_err(|_| Failure::Usage(self.in_file(&problems)))?;
            say(&format!(
                "configuration is good: {} listeners, {} clusters, {} secrets{}",
                resources.listeners.len(),
                resources.clusters.len(),
                resources.secrets.len(),
                if comes_by_xds { ", more by xDS" } else { "" }
            ));
            for warning in &problems.warnings {
                say(&format!("warning: {warning}"));
            }
            for path in &bootstrap.notes.not_honoured {
                say(&format!("not honoured: {path}"));
            }
            for warning in &bootstrap.notes.warnings {
                say(&format!("warning: {warning}"));
            }
            return Ok(None);
        }
        let default = enrolment.as_ref().map(|_| SocketAddr::from(([127, 0, 0, 1], 15000)));
        let admin = self.admin.or(bootstrap.admin).or(default);
        Ok(Some(Understood {
            bootstrap,
            enrolment,
            ports: self.ports.with(admin),
            patience: Duration::from_secs(self.drain_timeout),
        }))
    }
}

impl DataPlane {
    /// What is not served, a line each with the file's name.
    fn in_file(&self, problems: &Problems) -> String {
        let file = self.config.as_ref().map(|file| file.display().to_string()).unwrap_or_default();
        let lines = problems.unserved.iter().chain(&problems.unreachable);
        let lines: Vec<String> = lines.map(|problem| format!("{file}: {problem}")).collect();
        lines.join("\n")
    }
}

/// What of a file is complete without what comes by xDS.
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

/// Beside whom something stands.
#[derive(Debug, Args)]
pub(super) struct Workload {
    /// The service beside which it stands; its identity is spiffe://TRUST_DOMAIN/ns/default/sa/SERVICE.
    #[arg(
        long,
        value_name = "NAME",
        required_unless_present = "config",
        conflicts_with = "config"
    )]
    service: Option<String>,
    /// The trust domain.
    #[arg(long, default_value = "mesh.local", value_name = "NAME", conflicts_with = "config")]
    trust_domain: String,
}

impl Workload {
    /// Its identity; none where a file says everything.
    pub(super) fn identity(&self) -> Result<Option<SpiffeId>, Failure> {
        let identity = |service| weft_control::mesh::identity(&self.trust_domain, service);
        let identity = self.service.as_deref().map(identity).transpose();
        identity.map_err(|error| Failure::Usage(format!("--service and --trust-domain: {error}")))
    }
}

/// What writes access lines to standard output.
pub(super) fn access_writer() -> Result<Writer, Failure> {
    let writer = Writer::start(std::io::stdout());
    writer.map_err(|error| Failure::Failed(format!("access lines: {error}")))
}

/// Reads the roots by which the control plane is known. Without one no control plane could be verified, and the
/// process would try again without end.
fn read_roots(file: &Path) -> Result<Vec<u8>, Failure> {
    let refuse = |why: String| Failure::Usage(format!("--trust {}: {why}", file.display()));
    let bytes = std::fs::read(file).map_err(|error| refuse(error.to_string()))?;
    let roots: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    match roots {
        Ok(roots) if !roots.is_empty() => Ok(bytes),
        Ok(_) => Err(refuse("no certificate: must hold root certificates, PEM".to_owned())),
        Err(error) => Err(refuse(error.to_string())),
    }
}

fn read(file: &PathBuf) -> Result<Bootstrap, Failure> {
    let text = std::fs::read_to_string(file)
        .map_err(|e| Failure::Usage(format!("{}: {e}", file.display())))?;
    Bootstrap::parse(&text).map_err(|problems| {
        let lines: Vec<String> =
            problems.iter().map(|problem| format!("{}: {problem}", file.display())).collect();
        Failure::Usage(lines.join("\n"))
    })
}
