//! Checks that a mesh can be encoded as xDS resources. The file is rejected otherwise: sidecars would retry and get an error
//! each time.

use std::sync::Arc;

use weft_xds::server::Fragment;

use super::scope::{self, InboundParts, PolicyIndex};
use super::sidecar;
use super::trust::Trust;
use super::views::Views;
use crate::mesh::{Mesh, Service};

/// The most threads that encode at the same time.
const ENCODER_LIMIT: usize = 8;
/// The most errors that are reported.
const NAMED_LIMIT: usize = 20;

/// Encodes all resources that clients of a mesh receive.
///
/// # Errors
/// Each resource that cannot be encoded, with its service if it belongs to one.
pub fn check_encodable(mesh: Arc<Mesh>) -> Result<(), Vec<String>> {
    check_inbound(&mesh, None)?;
    // The trust bundle is not parsed here.
    let trust = Trust { roots: String::new(), revocations: String::new() };
    Views::new(mesh, &trust, 0, &Views::default()).map(drop)
}

/// Encodes the inbound configuration of each meshed service for which it differs from `earlier`, a mesh that was checked.
/// Returns the number of these services.
///
/// # Errors
/// Each service whose inbound configuration cannot be encoded, with the reason.
pub(crate) fn check_inbound(mesh: &Mesh, earlier: Option<&Mesh>) -> Result<usize, Vec<String>> {
    let index = PolicyIndex::new(mesh);
    let global = Arc::new(scope::global(mesh));
    let earlier = earlier.filter(|earlier| scope::global(earlier) == *global);
    // Usually only services change. Then policies and issuers need no comparison per service.
    let only_services = earlier.is_some_and(|earlier| {
        earlier.policies == mesh.policies && earlier.issuers == mesh.issuers
    });
    let earlier = earlier.map(|earlier| (earlier, PolicyIndex::new(earlier)));
    let is_known = |service: &Service| {
        earlier.as_ref().is_some_and(|(earlier, earlier_index)| {
            let before = earlier.services.get(&service.name);
            before.is_some_and(|before| {
                if only_services {
                    return before == service;
                }
                InboundParts::new(earlier, &global, earlier_index, before)
                    == InboundParts::new(mesh, &global, &index, service)
            })
        })
    };
    let meshed = mesh.services.values().filter(|service| service.meshed);
    let changed: Vec<&Service> = meshed.filter(|service| !is_known(service)).collect();
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(ENCODER_LIMIT);
    let check = |share: &[&Service]| -> Vec<String> {
        let parts = share.iter().map(|service| InboundParts::new(mesh, &global, &index, service));
        parts.filter_map(|parts| problem_of(&parts)).collect()
    };
    let problems: Vec<String> = std::thread::scope(|scope| {
        let share = changed.len().div_ceil(threads).max(1);
        let spawned: Vec<_> =
            changed.chunks(share).map(|share| scope.spawn(move || check(share))).collect();
        let ended = |_| vec!["an encoder thread panicked".to_owned()];
        spawned.into_iter().flat_map(|thread| thread.join().unwrap_or_else(ended)).collect()
    });
    if problems.is_empty() {
        return Ok(changed.len());
    }
    Err(problems.into_iter().take(NAMED_LIMIT).collect())
}

/// The reason why the inbound configuration of a service cannot be encoded, if any.
fn problem_of(parts: &InboundParts<'_>) -> Option<String> {
    let mut inbound = sidecar::inbound_configuration(&parts.scope().mesh());
    // The two listeners differ by their addresses only, and encoding them takes most of the time.
    inbound.listeners.pop_last();
    let problems = Fragment::encode(inbound).err()?;
    Some(format!(
        "services {:?}: inbound configuration cannot be encoded: {}",
        parts.service.name,
        problems.join("; ")
    ))
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;
    use std::path::Path;

    use super::*;

    /// A mesh whose service `api` requires tokens of this number of issuers.
    fn mesh(issuers: usize) -> Arc<Mesh> {
        let mut text = r#"trust_domain: mesh.local
service_ranges: [10.96.0.0/16]
services:
- {name: api, addresses: [10.96.0.1], ports: [{port: 80, target: 8080, protocol: http}]}
- {name: web, addresses: [10.96.0.2], ports: [{port: 80, target: 8080, protocol: http}]}
security:
  issuers:
"#
        .to_owned();
        let mut allow = String::new();
        for index in 0..issuers {
            let keys = "jwks_uri: 'http://a/', jwks_address: '10.1.1.1:80'";
            writeln!(text, "    i{index}: {{issuer: i{index}, audiences: [a], {keys}}}").unwrap();
            write!(allow, "{{from: [web], paths: [/{index}], token: i{index}}},").unwrap();
        }
        writeln!(text, "  policies: [{{service: api, allow: [{allow}]}}]").unwrap();
        Arc::new(Mesh::parse(&text, Path::new(".")).unwrap_or_else(|p| panic!("{p:?}")))
    }

    #[test]
    fn inbound_configuration_that_cannot_be_encoded_is_refused() {
        check_encodable(mesh(100)).expect("an encodable mesh");
        let refused = check_encodable(mesh(101)).expect_err("too many issuers for one service");
        assert_eq!(refused.len(), 1, "{refused:?}");
        let expected = "services \"api\": inbound configuration cannot be encoded: ";
        assert!(refused[0].starts_with(expected) && refused[0].contains("100"), "{refused:?}");
        check_inbound(&mesh(101), Some(&mesh(100))).expect_err("changed policies");
        assert_eq!(check_inbound(&mesh(99), Some(&mesh(100))), Ok(1), "web is unchanged");
        assert_eq!(check_inbound(&mesh(101), Some(&mesh(101))), Ok(0), "it was checked before");
        assert_eq!(check_inbound(&mesh(100), None), Ok(2));
    }
}
