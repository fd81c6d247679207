//! Serves a workload's certificate and what it trusts, by SDS on a Unix socket, to a proxy of another kind
//! that stands beside it.

use std::io;
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, PermissionsExt as _};
use std::path::Path;
use std::sync::Arc;

use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, watch};
use weft_model::{RevocationMode, RevocationPolicy, Secret, Snapshot, SpiffeId};
use weft_runtime::drain::{Drain, Phase};
use weft_xds::client::XdsNode;
use weft_xds::server::{
    IncomingConnection, RequestLimits, ResourceProvider, ResourceSet, ResourceSubscribers,
    XdsServerConfig, serve_resources,
};
use weft_xds::translate::ResourceKind;

/// What the roots and lists are called, beside what our control plane calls them: so Istio's proxies ask.
const ROOTS: &str = "ROOTCA";
/// How many connections may wait to be taken.
const WAITING: usize = 16;
/// How many connections there may be.
const CONNECTION_LIMIT: usize = 64;

/// The secrets of one workload. Whoever can reach the socket may have them.
#[derive(Debug, Default)]
pub struct Secrets(Arc<ResourceSet>);

impl ResourceProvider for Secrets {
    fn resources(
        &self,
        _node: &XdsNode,
        _peer: Option<&SpiffeId>,
    ) -> Result<Arc<ResourceSet>, String> {
        Ok(self.0.clone())
    }
}

impl Secrets {
    /// Encodes them.
    ///
    /// # Errors
    /// What has no form in xDS: a mistake of ours, named.
    fn of(secrets: Snapshot) -> Result<Self, Vec<String>> {
        ResourceSet::new(secrets, &[]).map(|set| Self(Arc::new(set)))
    }
}

/// The secrets of a configuration, as a proxy of another kind can make use of them.
fn secrets(snapshot: &Snapshot) -> Snapshot {
    let mut secrets = Snapshot { revision: snapshot.revision, ..Snapshot::default() };
    for (name, secret) in &snapshot.secrets {
        let secret = plain(secret);
        if let Secret::Validation(_) = secret.as_ref() {
            secrets.secrets.entry(ROOTS.into()).or_insert_with(|| secret.clone());
        }
        secrets.secrets.insert(name.clone(), secret);
    }
    secrets
}

/// Without what is ours alone and would be refused.
fn plain(secret: &Arc<Secret>) -> Arc<Secret> {
    let Secret::Validation(validation) = secret.as_ref() else {
        return secret.clone();
    };
    let mut plain = validation.clone();
    let ours = std::mem::take(&mut plain.policy);
    plain.policy = RevocationPolicy { depth: ours.depth, ..plain.policy };
    plain.points.clear();
    if ours.mode == RevocationMode::Off {
        plain.revocations = None;
    }
    Arc::new(Secret::Validation(plain))
}

/// Makes the socket, for this user alone, in the place of one that nobody listens on any more.
///
/// # Errors
/// When somebody does, or it cannot be made.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => return Err(io::Error::new(io::ErrorKind::AddrInUse, "somebody listens there")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            if !std::fs::symlink_metadata(path)?.file_type().is_socket() {
                return Err(io::Error::new(io::ErrorKind::AlreadyExists, "it is no socket"));
            }
            std::fs::remove_file(path)?;
        }
        Err(error) => return Err(error),
    }
    // Nobody else may come by between its making and its mode.
    let own = path.with_extension(format!("{}.part", std::process::id()));
    std::fs::DirBuilder::new().mode(0o700).create(&own)?;
    let made = own.join("s");
    let listener = UnixListener::bind(&made).and_then(|listener| {
        std::fs::set_permissions(&made, std::fs::Permissions::from_mode(0o600))?;
        std::fs::rename(&made, path)?;
        Ok(listener)
    });
    // It is empty, or tells why it is not.
    drop(std::fs::remove_dir_all(&own));
    listener
}

/// Serves the secrets of each snapshot on a socket until the process drains.
pub async fn run(
    listener: UnixListener,
    mut snapshots: watch::Receiver<Arc<Snapshot>>,
    served: watch::Sender<Arc<Snapshot>>,
    drain: Drain,
) {
    let directory = watch::Sender::new(Arc::new(Secrets::default()));
    let (connections, waiting) = mpsc::channel(WAITING);
    let serving = serve_resources(
        waiting,
        XdsServerConfig {
            provider: directory.subscribe(),
            subscribers: Arc::new(ResourceSubscribers::new(ResourceKind::Secret, ROOTS)),
            limits: RequestLimits::default(),
        },
        drain.reached(Phase::Draining),
    );
    let keeping = async {
        loop {
            let secrets = secrets(&snapshots.borrow_and_update());
            match Secrets::of(secrets.clone()) {
                Ok(set) => {
                    directory.send_replace(Arc::new(set));
                    served.send_replace(Arc::new(secrets));
                }
                Err(problems) => tracing::error!(?problems, "secrets cannot be served"),
            }
            if snapshots.changed().await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        served = serving => {
            if let Err(error) = served {
                tracing::error!(error, "secrets are served no more");
            }
        }
        () = keeping => {}
        () = accept(&listener, &connections) => {}
    }
}

async fn accept(
    listener: &UnixListener,
    connections: &mpsc::Sender<IncomingConnection<UnixStream>>,
) {
    let room = Arc::new(Semaphore::new(CONNECTION_LIMIT));
    loop {
        // At the limit a newcomer waits in the socket's queue.
        let Ok(permit) = room.clone().acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((io, _)) => {
                let incoming = IncomingConnection { io, peer: None, permit: Some(permit) };
                if connections.send(incoming).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                tracing::warn!(%error, "a connection could not be taken");
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            }
        }
    }
}
