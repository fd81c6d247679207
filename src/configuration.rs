//! One stream of configuration snapshots from a bootstrap file, an xDS server, or both.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use http::HeaderMap;
use rustls::ClientConfig;
use rustls_pki_types::UnixTime;
use tokio::sync::watch;
use weft_certs::tls::{ClientTls, LoadedIdentity};
use weft_certs::{TrustStore, system_roots_file, usable_roots};
use weft_model::{DataSource, Discovery, Name, Secret, Snapshot, SpiffeId, UpstreamTls};
use weft_runtime::clock::wall_clock;
use weft_runtime::socket::Mark;
use weft_xds::bootstrap::{AdsSource, Bootstrap};
use weft_xds::client::{
    self as xds, ClientSession, DnsChannels, Follower, Warming, XdsNode, XdsStatus, XdsVariant,
};
use weft_xds::dial::Dialer;
use weft_xds::translate::{Notes, WORKLOAD_IDENTITY};

use crate::dial::dial_tls;
use crate::identity::{CurrentCertificate, Enrolment, control_dial};
use crate::resolver::{self, FailedLookups};

/// The bootstrap configuration of a process that is started with `--control`.
#[must_use]
pub fn bootstrap_for(identity: Option<&SpiffeId>) -> Bootstrap {
    let id = identity.map(ToString::to_string).unwrap_or_default();
    let cluster = identity.map(|id| id.workload().to_owned()).unwrap_or_default();
    Bootstrap {
        node: XdsNode { id, cluster, ..XdsNode::default() },
        resources: Snapshot::default(),
        ads: Some(AdsSource {
            variant: XdsVariant::Delta,
            cluster: Name::from("control"),
            metadata: HeaderMap::new(),
        }),
        admin: None,
        notes: Notes::default(),
    }
}

/// The inputs and outputs of the configuration stream.
#[derive(Debug)]
pub struct Channels {
    /// Secrets that this process creates.
    pub local: watch::Sender<BTreeMap<Name, Arc<Secret>>>,
    /// Receives every snapshot.
    pub published: watch::Sender<Arc<Snapshot>>,
    /// Receives the xDS status.
    pub status: watch::Sender<XdsStatus>,
    /// Receives the host names whose last lookup failed.
    pub unresolved: watch::Sender<FailedLookups>,
}

/// Follows the configuration until the task is dropped.
pub async fn follow(
    bootstrap: Bootstrap,
    enrolled: Option<(Enrolment, watch::Receiver<CurrentCertificate>)>,
    mark: Option<Mark>,
    channels: Channels,
) {
    let Channels { local, published, status, unresolved } = channels;
    status.send_modify(|status| status.note("bootstrap".to_owned(), bootstrap.notes.clone()));
    let variant = bootstrap.ads.as_ref().map_or(XdsVariant::Delta, |ads| ads.variant);
    let mut local_secrets: BTreeSet<Name> = bootstrap.resources.secrets.keys().cloned().collect();
    local_secrets.insert(WORKLOAD_IDENTITY.into());
    let session = ClientSession::new(variant, bootstrap.node.clone(), local_secrets);
    let dial = match (&bootstrap.ads, enrolled) {
        (None, _) => None,
        (Some(_), Some((enrolment, current))) => Some(renewing_dial(enrolment, current, mark)),
        (Some(ads), None) => match dial_cluster(&bootstrap.resources, &ads.cluster, mark) {
            Ok(dial) => Some(dial),
            Err(error) => {
                tracing::error!(
                    error,
                    "cannot connect to the xDS server, only the bootstrap file is served"
                );
                None
            }
        },
    };
    let metadata = bootstrap.ads.map(|ads| ads.metadata).unwrap_or_default();
    let dial = dial.map(|dial| dial.with_metadata(metadata));
    let wanted = watch::Sender::new(BTreeSet::new());
    let answers = watch::Sender::new(Arc::default());
    let hosts = DnsChannels { wanted, answers: answers.subscribe() };
    tokio::spawn(resolver::run(hosts.wanted.subscribe(), answers, unresolved));
    let has_server = dial.is_some();
    let follower = Follower {
        has_server,
        fixed: bootstrap.resources,
        local: local.subscribe(),
        publish: published,
        status,
        hosts,
        warming: Warming::new(),
    };
    xds::follow(dial, session, follower).await;
}

/// A dialer that uses the certificate that is current at each connection attempt.
fn renewing_dial(
    enrolment: Enrolment,
    current: watch::Receiver<CurrentCertificate>,
    mark: Option<Mark>,
) -> Dialer {
    Dialer::new(move || {
        let current = current.borrow().clone();
        match control_dial(&enrolment, Some(current.identity()), current.root(), mark) {
            Ok(dial) => dial.open(),
            Err(error) => Box::pin(async move { Err(io::Error::other(error)) }),
        }
    })
}

/// A dialer to the first endpoint of a static cluster.
fn dial_cluster(resources: &Snapshot, name: &str, mark: Option<Mark>) -> Result<Dialer, String> {
    let cluster =
        resources.clusters.get(name).ok_or_else(|| format!("unknown cluster {name:?}"))?;
    let address = match &cluster.discovery {
        Discovery::Static(set) => {
            set.endpoints.first().map(|endpoint| endpoint.address.to_string())
        }
        Discovery::Dns(dns) => dns.hosts.first().map(|host| host_port(&host.name, host.port)),
        Discovery::Endpoints(_) | Discovery::OriginalDestination => None,
    };
    let address = address.ok_or_else(|| format!("cluster {name:?} has no static endpoint"))?;
    let config = cluster.tls.as_ref().map(|tls| cluster_tls(resources, tls)).transpose()?;
    Ok(dial_tls(address, config, mark))
}

/// `HOST:PORT` for a lookup; an IPv6 address is put in brackets.
fn host_port(name: &str, port: u16) -> String {
    match name.parse::<IpAddr>() {
        Ok(address) => SocketAddr::new(address, port).to_string(),
        Err(_) => format!("{name}:{port}"),
    }
}

fn cluster_tls(resources: &Snapshot, tls: &UpstreamTls) -> Result<Arc<ClientConfig>, String> {
    let secret = |source| resources.secret(source).ok_or("a secret of the xDS cluster is missing");
    let identity = match &tls.identity {
        None => None,
        Some(source) => match secret(source)?.as_ref() {
            Secret::Identity(own) => Some(
                LoadedIdentity::load(&read(&own.chain)?, &read(&own.key)?)
                    .map_err(|error| error.to_string())?,
            ),
            Secret::Validation(_) => {
                return Err(
                    "the certificate secret of the xDS cluster is a validation context".into()
                );
            }
        },
    };
    let validation = tls.validation.as_ref();
    let validation = validation.ok_or("the TLS context of the xDS cluster has no trusted_ca")?;
    let Secret::Validation(validation) = secret(validation)?.as_ref() else {
        return Err("the validation secret of the xDS cluster is a certificate".into());
    };
    if !validation.points.is_empty() {
        return Err(
            "distribution_points is not supported for the xDS cluster: set crl instead".into()
        );
    }
    let now =
        UnixTime::since_unix_epoch(wall_clock().duration_since(UNIX_EPOCH).unwrap_or_default());
    let revocations = validation.revocations.as_ref().map(read).transpose()?;
    let trust = TrustStore::load(
        &read(&validation.roots)?,
        revocations.as_deref(),
        validation.names.clone(),
        None,
        now,
    )
    .map_err(|error| error.to_string())?;
    let names = tls.names.clone();
    let alpn = ["h2".into()];
    let client = ClientTls::new(identity.as_ref(), Arc::new(trust), names, &alpn, &tls.parameters);
    client.map(|client| client.full_handshake_config().clone()).map_err(|error| error.to_string())
}

fn read(data: &DataSource) -> Result<Vec<u8>, String> {
    match data {
        DataSource::Inline(bytes) => Ok(bytes.to_vec()),
        DataSource::File(path) => {
            std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))
        }
        DataSource::SystemRoots => {
            let read = system_roots_file().and_then(std::fs::read);
            read.map(|bundle| usable_roots(&bundle)).map_err(|error| error.to_string())
        }
    }
}
