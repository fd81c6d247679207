//! `weft control`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use tokio::sync::watch;
use weft_control::mesh::{Mesh, MeshFile};
use weft_control::resources::check_encodable;
use weft_control::store::Store;
use weft_control::{ControlOptions, ControlStatus};
use weft_runtime::clock::wall_clock;
use weft_runtime::drain::{Drain, drain_on_signals};
use weft_runtime::metrics::{MetricsPage, add_process_metrics};
use weft_runtime::{admin, log, memory, open_files};
use weft_xds::server::RequestLimits;

use super::admin_ports::AdminPortArgs;
use super::{CommandError, print_line};

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    weft ca init --state /var/lib/weft --trust-domain mesh.local\n  \
    weft control -c mesh.yaml --state /var/lib/weft\n  \
    weft control -c mesh.yaml --check-config")]
pub(super) struct ControlArgs {
    /// Mesh configuration, YAML
    #[arg(short = 'c', long = "config", value_name = "FILE")]
    config: PathBuf,
    /// State directory of the certificate authority, created by `weft ca init`
    #[arg(long, value_name = "DIRECTORY", required_unless_present = "check_config")]
    state: Option<PathBuf>,
    /// Listen address for xDS and certificate requests; [::] listens on every IPv4 and IPv6 address
    #[arg(long, default_value = "[::]:15010", value_name = "ADDRESS")]
    listen: SocketAddr,
    /// Listen address of the admin port
    #[arg(long, default_value = "127.0.0.1:15000", value_name = "ADDRESS")]
    admin: SocketAddr,
    #[command(flatten)]
    ports: AdminPortArgs,
    /// Validity of workload certificates, in minutes
    #[arg(long, default_value_t = 24 * 60, value_name = "MINUTES", value_parser = clap::value_parser!(u64).range(1..=60 * 24 * 30))]
    certificate_minutes: u64,
    /// Maximum number of connections from authenticated clients; at the limit, identities with many connections
    /// lose some to identities with few
    #[arg(long, default_value_t = 16_384, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    connection_limit: u32,
    /// Maximum size of a request from an authenticated client, in bytes. A reconnecting client sends about 50 bytes per
    /// resource
    #[arg(long, default_value_t = RequestLimits::DEFAULT_MESSAGE_BYTES, value_name = "BYTES", value_parser = clap::value_parser!(u32).range(4096..=64 * 1024 * 1024))]
    request_limit: u32,
    /// Validate the mesh configuration, print a summary and exit
    #[arg(long)]
    check_config: bool,
}

pub(super) fn run(arguments: ControlArgs, filter: &str) -> Result<(), CommandError> {
    let mut file = MeshFile::new(arguments.config);
    {
        let mesh = check(&mut file)?;
        if arguments.check_config {
            return check_all(mesh, &file);
        }
    }
    let Some(state) = arguments.state else {
        return Err(CommandError::Usage("missing --state".into()));
    };
    let level = log::start(filter).map_err(CommandError::Usage)?;
    open_files::raise_limit();
    memory::disable_core_dumps();
    let store =
        Arc::new(Store::open(&state).map_err(|error| CommandError::Failed(error.to_string()))?);
    let drain = Drain::new(Duration::from_secs(2));
    let status = watch::Sender::new(ControlStatus::default());
    let role = Arc::new(ControlRole { status: status.subscribe() });
    let port = admin::Admin { role, drain: drain.clone(), log: level };
    admin::start(&arguments.ports.with(Some(arguments.admin)), port)
        .map_err(|error| CommandError::Failed(error.to_string()))?;
    let options = ControlOptions {
        listen: arguments.listen,
        certificate_life: Duration::from_secs(arguments.certificate_minutes * 60),
        connections: usize::try_from(arguments.connection_limit).unwrap_or(usize::MAX),
        requests: RequestLimits::for_message_bytes(arguments.request_limit),
    };
    let runtime =
        tokio::runtime::Runtime::new().map_err(|error| CommandError::Failed(error.to_string()))?;
    runtime.block_on(async {
        drain_on_signals(&drain).map_err(|error| error.to_string())?;
        weft_control::run(options, file, store, status, drain.clone()).await
    })?;
    runtime.shutdown_timeout(Duration::from_millis(200));
    Ok(())
}

fn check(file: &mut MeshFile) -> Result<Mesh, CommandError> {
    let read = file.read(wall_clock());
    let mesh = read.map_err(|problems| CommandError::Usage(problems.join("\n")))?;
    for warning in &mesh.warnings {
        print_line(&format!("warning: {}", warning.in_file(file.path().display())));
    }
    Ok(mesh)
}

/// Encodes all resources that clients would receive, and prints a summary of the mesh.
fn check_all(mesh: Mesh, file: &MeshFile) -> Result<(), CommandError> {
    let summary = format!(
        "mesh is valid: {} services, {} routes, {} policies, {} revocations",
        mesh.services.len(),
        mesh.routes.len(),
        mesh.policies.len(),
        mesh.revocations.len()
    );
    check_encodable(Arc::new(mesh)).map_err(|problems| {
        let path = file.path().display();
        let lines: Vec<String> =
            problems.iter().map(|problem| format!("{path}: {problem}")).collect();
        CommandError::Usage(lines.join("\n"))
    })?;
    print_line(&summary);
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

struct ControlRole {
    status: watch::Receiver<ControlStatus>,
}

impl admin::AdminRole for ControlRole {
    fn ready(&self) -> Result<(), String> {
        let status = self.status.borrow();
        match (status.applied, status.is_listening, &status.store) {
            (0, _, _) => Err("no valid mesh configuration applied yet".into()),
            (_, false, _) => Err("the xDS port is not bound yet".into()),
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
