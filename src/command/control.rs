//! `weft control`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use clap::Args;
use tokio::sync::watch;
use weft_control::mesh::{Mesh, MeshFile};
use weft_control::resources::check_encodable;
use weft_control::store::Store;
use weft_control::{ControlOptions, ControlStatus};
use weft_runtime::drain::{Drain, drain_on_signals};
use weft_runtime::metrics::{MetricsPage, add_process_metrics};
use weft_runtime::{admin, log, memory, open_files};
use weft_xds::server::RequestLimits;

use super::admin_ports::AdminPorts;
use super::{Failure, say};

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    weft ca init --state /var/lib/weft --trust-domain mesh.local\n  \
    weft control -c mesh.yaml --state /var/lib/weft\n  \
    weft control -c mesh.yaml --check-config")]
pub(super) struct Arguments {
    /// The mesh.
    #[arg(short = 'c', long = "config", value_name = "FILE")]
    config: PathBuf,
    /// The folder of the authority; made by `weft ca init`.
    #[arg(long, value_name = "FOLDER", required_unless_present = "check_config")]
    state: Option<PathBuf>,
    /// Where clients connect. [::] is every address of both families.
    #[arg(long, default_value = "[::]:15010", value_name = "ADDRESS")]
    listen: SocketAddr,
    /// Where the admin port listens.
    #[arg(long, default_value = "127.0.0.1:15000", value_name = "ADDRESS")]
    admin: SocketAddr,
    #[command(flatten)]
    ports: AdminPorts,
    /// How long the certificates of workloads are good, in minutes.
    #[arg(long, default_value_t = 24 * 60, value_name = "MINUTES", value_parser = clap::value_parser!(u64).range(1..=60 * 24 * 30))]
    certificate_minutes: u64,
    /// How many clients with a certificate may be connected. When all places are taken, identities with many
    /// connections give way to those with few.
    #[arg(long, default_value_t = 16_384, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    connection_limit: u32,
    /// The largest request of a client with a certificate, in bytes. A client that reconnects sends the names and
    /// versions of its resources: about 50 bytes for each.
    #[arg(long, default_value_t = RequestLimits::DEFAULT_MESSAGE_BYTES, value_name = "BYTES", value_parser = clap::value_parser!(u32).range(4096..=64 * 1024 * 1024))]
    request_limit: u32,
    /// Check the mesh, print what it is, and end.
    #[arg(long)]
    check_config: bool,
}

pub(super) fn run(arguments: Arguments, filter: &str) -> Result<(), Failure> {
    let mut file = MeshFile::new(arguments.config);
    {
        let mesh = check(&mut file)?;
        if arguments.check_config {
            return check_all(mesh, &file);
        }
    }
    let Some(state) = arguments.state else {
        return Err(Failure::Usage("--state is missing".into()));
    };
    let level = log::start(filter).map_err(Failure::Usage)?;
    open_files::raise_limit();
    memory::disable_core_dumps();
    let store = Arc::new(Store::open(&state).map_err(|error| Failure::Failed(error.to_string()))?);
    let drain = Drain::new(Duration::from_secs(2));
    let status = watch::Sender::new(ControlStatus::default());
    let role = Arc::new(Role { status: status.subscribe() });
    let port = admin::Admin { role, drain: drain.clone(), log: level };
    admin::start(&arguments.ports.with(Some(arguments.admin)), port)
        .map_err(|error| Failure::Failed(error.to_string()))?;
    let options = ControlOptions {
        listen: arguments.listen,
        certificate_life: Duration::from_secs(arguments.certificate_minutes * 60),
        connections: usize::try_from(arguments.connection_limit).unwrap_or(usize::MAX),
        requests: RequestLimits::for_message_bytes(arguments.request_limit),
    };
    let runtime =
        tokio::runtime::Runtime::new().map_err(|error| Failure::Failed(error.to_string()))?;
    runtime.block_on(async {
        drain_on_signals(&drain).map_err(|error| error.to_string())?;
        weft_control::run(options, file, store, status, drain.clone()).await
    })?;
    runtime.shutdown_timeout(Duration::from_millis(200));
    Ok(())
}

fn check(file: &mut MeshFile) -> Result<Mesh, Failure> {
    let read = file.read(wall_clock());
    let mesh = read.map_err(|problems| Failure::Usage(problems.join("\n")))?;
    for warning in &mesh.warnings {
        say(&format!("warning: {}", warning.in_file(file.path().display())));
    }
    Ok(mesh)
}

/// Encodes all that clients would be sent, and prints what the mesh is.
fn check_all(mesh: Mesh, file: &MeshFile) -> Result<(), Failure> {
    let good = format!(
        "mesh is good: {} services, {} routes, {} policies, {} revocations",
        mesh.services.len(),
        mesh.routes.len(),
        mesh.policies.len(),
        mesh.revocations.len()
    );
    check_encodable(Arc::new(mesh)).map_err(|problems| {
        let path = file.path().display();
        let lines: Vec<String> =
            problems.iter().map(|problem| format!("{path}: {problem}")).collect();
        Failure::Usage(lines.join("\n"))
    })?;
    say(&good);
    Ok(())
}

fn add_metrics(status: &ControlStatus, page: &mut MetricsPage<'_>) {
    page.counter(
        "weft_control_config_updates",
        "Configurations of the mesh that were applied.",
        status.applied,
    );
    page.gauge(
        "weft_control_config_errors",
        "Errors in the mesh file as it is now.",
        status.rejected.len() as u64,
    );
    page.gauge("weft_control_services", "Services in force.", status.services.len() as u64);
    page.gauge("weft_control_crl_number", "CRL number of the CRL in force.", status.crl_number);
    page.gauge(
        "weft_control_store_usable",
        "1 while the authority's store can be used, otherwise 0.",
        u64::from(status.store.is_none()),
    );
}

struct Role {
    status: watch::Receiver<ControlStatus>,
}

impl admin::AdminRole for Role {
    fn ready(&self) -> Result<(), String> {
        let status = self.status.borrow();
        match (status.applied, status.is_listening, &status.store) {
            (0, _, _) => Err("no mesh is in force yet".into()),
            (_, false, _) => Err("its port is not bound yet".into()),
            (_, true, Some(problem)) => Err(problem.clone()),
            (_, true, None) => Ok(()),
        }
    }

    fn metrics(&self, page: &mut MetricsPage<'_>) {
        add_metrics(&self.status.borrow(), page);
        add_process_metrics(page);
    }

    fn config_dump(&self) -> serde_json::Value {
        let status = self.status.borrow();
        serde_json::json!({
            "applied": status.applied,
            "rejected": status.rejected,
            "services": status.services,
            "revocation_list_number": status.crl_number,
            "store_problem": status.store,
        })
    }
}

#[allow(clippy::disallowed_methods, reason = "the edge where the clock is read")]
fn wall_clock() -> SystemTime {
    SystemTime::now()
}
