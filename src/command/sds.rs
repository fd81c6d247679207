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

use super::data_plane::{DataPlane, Workload, access_writer};
use super::{Failure, say};
use crate::process::{self, Particulars, Setup};
use crate::sds;

#[derive(Debug, Args)]
#[command(
    long_about = "A workload's certificate and what it trusts, for a proxy of another kind.\n\n\
        Gets a certificate like a sidecar does, renews it, and serves it by SDS on a Unix socket, as `default`; the \
        mesh's roots and revocation lists as `ROOTCA`. Whoever may open the socket gets the private key: it is for the \
        user alone who runs this.",
    after_help = "Examples:\n  \
        weft sds --control 10.0.0.2:15010 --trust root.pem --join-token-file token --service web --socket /run/weft/sds\n  \
        then in Envoy: sds_config with a cluster whose endpoint is pipe: {path: /run/weft/sds}"
)]
pub(super) struct Arguments {
    #[command(flatten)]
    data_plane: DataPlane,
    #[command(flatten)]
    workload: Workload,
    /// The socket.
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
}

pub(super) fn run(arguments: &Arguments, log: &str) -> Result<(), Failure> {
    let identity = arguments.workload.identity()?;
    let Some(understood) = arguments.data_plane.understand(identity, |_| Problems::default())?
    else {
        return Ok(());
    };
    // It has no data to carry: its one worker waits for the end.
    let begun = process::begin("sds", Some(NonZeroUsize::MIN), log).map_err(Failure::Failed)?;
    let served = watch::Sender::new(Arc::new(Snapshot::default()));
    let setup = Setup {
        bootstrap: understood.bootstrap,
        enrolment: understood.enrolment,
        ports: understood.ports,
        patience: understood.patience,
        access: access_writer()?,
        particulars: Arc::new(SdsRole { served: served.subscribe() }),
    };
    let mut process = begun.start(setup).map_err(Failure::Failed)?;
    let (socket, snapshots, drain) =
        (arguments.socket.clone(), process.snapshots(), process.drain());
    let listener = process.block_on(async { sds::listen(&socket) });
    let listener = listener
        .map_err(|error| Failure::Failed(format!("--socket {}: {error}", socket.display())))?;
    say(&format!("secrets are served at {}", socket.display()));
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
    // Nobody listens there any more.
    drop(std::fs::remove_file(&socket));
    served.map_err(Failure::Failed)
}

/// Reports for readiness that the socket serves the secrets of a configuration, once there is one.
async fn report_serving(
    worker: usize,
    mut served: watch::Receiver<Arc<Snapshot>>,
    reports: UnboundedSender<ListenReport>,
) {
    // The sender ends with the process.
    if let Ok(served) = served.wait_for(|served| served.revision > 0).await {
        let report = ListenReport { worker, revision: served.revision, failures: Vec::new() };
        drop(reports.send(report));
    }
}

/// What it tells of itself.
struct SdsRole {
    served: watch::Receiver<Arc<Snapshot>>,
}

impl Particulars for SdsRole {
    fn metrics(&self, page: &mut MetricsPage<'_>) {
        let count = self.served.borrow().secrets.len() as u64;
        page.gauge("weft_sds_secrets", "Secrets served over SDS.", count);
    }
}
