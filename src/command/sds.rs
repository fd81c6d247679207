//! `weft sds`.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::watch;
use weft_model::Snapshot;
use weft_runtime::drain::Phase;
use weft_runtime::listening::ListenReport;
use weft_runtime::metrics::MetricsPage;
use weft_runtime::problems::Problems;

use super::data_plane::{DataPlaneArgs, WorkloadArgs, access_writer};
use super::{CommandError, print_line};
use crate::process::{self, DataPlaneSetup, RoleReport};
use crate::sds;

#[derive(Debug, Args)]
#[command(
    long_about = "Serve workload certificates and trust bundles to Envoy over SDS.\n\n\
        Obtains a certificate from the control plane, renews it, and serves it over SDS on a Unix socket as secret \
        `default`; the trust bundle with its CRLs is secret `ROOTCA`. Every process that can open the socket can read \
        the private key; the socket is accessible only to the user that runs the command.",
    after_help = "Examples:\n  \
        weft sds --control 10.0.0.2:15010 --trust root.pem --join-token-file token --service web --socket /run/weft/sds\n  \
        In Envoy: an sds_config whose cluster has the endpoint pipe: {path: /run/weft/sds}"
)]
pub(super) struct SdsArgs {
    #[command(flatten)]
    data_plane: DataPlaneArgs,
    #[command(flatten)]
    workload: WorkloadArgs,
    /// Path of the Unix socket to listen on
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
}

pub(super) fn run(arguments: &SdsArgs, log: &str) -> Result<(), CommandError> {
    let identity = arguments.workload.identity()?;
    let Some(options) = arguments.data_plane.resolve(identity, |_| Problems::default())? else {
        return Ok(());
    };
    // SDS carries no mesh traffic: the only worker waits for shutdown.
    let prepared =
        process::prepare("sds", Some(NonZeroUsize::MIN), log).map_err(CommandError::Failed)?;
    let served = watch::Sender::new(Arc::new(Snapshot::default()));
    let setup = DataPlaneSetup {
        bootstrap: options.bootstrap,
        enrolment: options.enrolment,
        ports: options.ports,
        grace_period: options.grace_period,
        access: access_writer()?,
        role: Arc::new(SdsRole { served: served.subscribe() }),
    };
    let mut process = prepared.start(setup).map_err(CommandError::Failed)?;
    let socket = arguments.socket.clone();
    let snapshots = process.snapshots();
    let drain = process.drain();
    let listener = process.block_on(async { sds::listen(&socket) });
    let listener = listener
        .map_err(|error| CommandError::Failed(format!("--socket {}: {error}", socket.display())))?;
    print_line(&format!("serving secrets at {}", socket.display()));
    let reports = process.reports();
    let serving = served.subscribe();
    process.spawn(sds::run(listener, snapshots, served, drain.clone()));
    let served = process.serve(move |worker| {
        let drain = drain.clone();
        let reports = reports.clone();
        let serving = serving.clone();
        async move {
            let draining = drain.reached(Phase::Draining);
            let reporting = report_serving(worker, serving, reports);
            tokio::join!(draining, reporting);
        }
    });
    // The listener is closed.
    drop(std::fs::remove_file(&socket));
    served.map_err(CommandError::Failed)
}

/// Reports to the readiness check that the socket serves secrets, once a configuration has arrived.
async fn report_serving(
    worker: usize,
    mut served: watch::Receiver<Arc<Snapshot>>,
    reports: UnboundedSender<ListenReport>,
) {
    // An error means that the process ends.
    if let Ok(served) = served.wait_for(|served| served.revision > 0).await {
        let report = ListenReport { worker, revision: served.revision, failures: Vec::new() };
        drop(reports.send(report));
    }
}

/// Metrics of `weft sds`.
struct SdsRole {
    served: watch::Receiver<Arc<Snapshot>>,
}

impl RoleReport for SdsRole {
    fn metrics(&self, page: &mut MetricsPage<'_>) {
        let count = self.served.borrow().secrets.len() as u64;
        page.gauge("weft_sds_secrets", "Secrets served over SDS.", count);
    }
}
