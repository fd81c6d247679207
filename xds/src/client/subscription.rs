//! Builds a delta request with many names and versions.

use envoy_types::pb::envoy::service::discovery::v3::DeltaDiscoveryRequest;
use weft_model::Name;

use crate::translate::ResourceKind;

/// The size at which a delta request is split: half of the 4 MiB that gRPC servers accept by default.
pub(super) const REQUEST_BYTES: usize = 2 * 1024 * 1024;
/// The most bytes that keys and lengths add to a name and a version.
const ENTRY_BYTES: usize = 16;

/// A delta request under construction.
pub(super) struct Subscription {
    pub(super) message: DeltaDiscoveryRequest,
    /// The approximate size of the message.
    pub(super) bytes: usize,
}

impl Subscription {
    pub(super) fn new(kind: ResourceKind) -> Self {
        let message =
            DeltaDiscoveryRequest { type_url: kind.type_url(), ..DeltaDiscoveryRequest::default() };
        Self { message, bytes: 0 }
    }

    pub(super) fn subscribe(&mut self, name: &Name) {
        self.bytes += name.len() + ENTRY_BYTES;
        self.message.resource_names_subscribe.push(name.to_string());
    }

    pub(super) fn unsubscribe(&mut self, name: &Name) {
        self.bytes += name.len() + ENTRY_BYTES;
        self.message.resource_names_unsubscribe.push(name.to_string());
    }

    pub(super) fn report(&mut self, name: &Name, version: &str) {
        self.bytes += name.len() + version.len() + ENTRY_BYTES;
        self.message.initial_resource_versions.insert(name.to_string(), version.to_owned());
    }
}
