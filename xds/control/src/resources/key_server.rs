//! Generates the clusters for the key servers of token issuers.

use std::num::NonZeroU32;
use std::sync::Arc;

use weft_model::{
    Balance, Cluster, DataSource, Discovery, DnsDiscovery, DnsHost, DnsPolicy, Endpoint,
    EndpointSet, Health, RevocationPolicy, Secret, SecretSource, TlsParameters, UpstreamTls,
    Validation,
};

use super::clusters::cluster;
use crate::mesh::{KeyServer, KeyServerRoots};

/// The cluster of an issuer's key server.
pub(super) fn cluster_of(issuer: &str, server: &KeyServer) -> Cluster {
    let name = format!("keys|{issuer}");
    let discovery = match server.address {
        Some(address) => {
            let endpoint = Endpoint::new(address, 1, Health::Healthy);
            Discovery::Static(EndpointSet { endpoints: endpoint.into_iter().collect() })
        }
        None => {
            let host =
                DnsHost { name: server.host.clone(), port: server.port, weight: NonZeroU32::MIN };
            let policy = DnsPolicy { respects_ttl: true, ..DnsPolicy::default() };
            Discovery::Dns(DnsDiscovery { hosts: vec![host], policy })
        }
    };
    let tls = server.roots.as_ref().map(|roots| {
        let validation = Validation {
            roots: match roots {
                KeyServerRoots::System => DataSource::SystemRoots,
                KeyServerRoots::File(_, bytes) => DataSource::inline(bytes.as_slice()),
            },
            revocations: None,
            points: Vec::new(),
            policy: RevocationPolicy::default(),
            names: Vec::new(),
        };
        UpstreamTls {
            identity: None,
            validation: Some(SecretSource::Inline(Arc::new(Secret::Validation(validation)))),
            names: Vec::new(),
            // No names are set, so the certificate must have this one.
            sni: Some(server.host.clone()),
            alpn: vec!["http/1.1".into()],
            parameters: TlsParameters::default(),
        }
    });
    Cluster { tls, ..cluster(&name, discovery, Balance::RoundRobin) }
}
