//! Serves the workload certificate and the trust bundle over SDS on a Unix socket, for Envoy on the same host.

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

/// A second name of the validation secret: proxies of Istio request the trust bundle by this name.
const ROOTS: &str = "ROOTCA";
/// The length of the queue of accepted connections.
const WAITING: usize = 16;
/// The maximum number of connections.
const CONNECTION_LIMIT: usize = 64;

/// The secrets of one workload. Every process that can open the socket may read them.
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
    /// Encodes the secrets as xDS resources.
    ///
    /// # Errors
    /// A secret cannot be encoded, which is a bug.
    fn of(secrets: Snapshot) -> Result<Self, Vec<String>> {
        ResourceSet::new(secrets, &[]).map(|set| Self(Arc::new(set)))
    }
}

/// The secrets of a configuration in a form that Envoy accepts.
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

/// The secret without the fields that only weft understands and Envoy would reject.
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

/// Creates the socket with mode 0600. Replaces a socket on which no process listens.
///
/// # Errors
/// Another process listens on the socket, the path is another kind of file, or the socket cannot be created.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => {
            return Err(io::Error::new(
                io::ErrorKind::AddrInUse,
                "in use: another process listens on this socket",
            ));
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            if !std::fs::symlink_metadata(path)?.file_type().is_socket() {
                return Err(io::Error::new(
                    io::ErrorKind::AlreadyExists,
                    "the file exists and is not a socket",
                ));
            }
            std::fs::remove_file(path)?;
        }
        Err(error) => return Err(error),
    }
    // Created in a private directory: no other user can connect before the mode is set.
    let own = path.with_extension(format!("{}.part", std::process::id()));
    std::fs::DirBuilder::new().mode(0o700).create(&own)?;
    let made = own.join("s");
    let listener = UnixListener::bind(&made).and_then(|listener| {
        std::fs::set_permissions(&made, std::fs::Permissions::from_mode(0o600))?;
        std::fs::rename(&made, path)?;
        Ok(listener)
    });
    // An error of the socket is returned below.
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
                Err(problems) => tracing::error!(?problems, "failed to encode secrets"),
            }
            if snapshots.changed().await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        served = serving => {
            if let Err(error) = served {
                tracing::error!(error, "SDS server stopped");
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
        // At the limit, new connections wait in the backlog of the socket.
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
                tracing::warn!(%error, "failed to accept connection");
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            }
        }
    }
}
