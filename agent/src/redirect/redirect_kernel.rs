//! What the guard needs of the kernel.

use super::apply::{apply, dropped_packets, remove, subscribe, verify};
use super::config::RedirectConfig;
use super::namespace::{Namespace, NamespaceId};
use super::probe::{ProbeOutcome, probe};
use super::types::{BackendChoice, RedirectBackend, RedirectError, RedirectState};
use crate::netlink::Netlink;

/// The kernel as the guard sees it.
pub(super) trait RedirectKernel {
    /// The identity of a namespace, `None` when it does not exist.
    fn namespace_id(&self, namespace: &Namespace) -> NamespaceId;

    /// Subscribes to changes that may affect the redirects.
    fn subscribe(
        &self,
        redirect: &RedirectConfig,
        namespace: &Namespace,
    ) -> Result<Vec<Netlink>, RedirectError>;

    /// Selects a backend that the host has.
    fn resolve(&self, choice: BackendChoice) -> Result<RedirectBackend, RedirectError>;

    /// Compares the installed rules with the desired ones.
    fn verify(
        &self,
        redirect: &RedirectConfig,
        backend: RedirectBackend,
        namespace: &Namespace,
    ) -> Result<RedirectState, RedirectError>;

    /// Installs the rules.
    fn apply(
        &self,
        redirect: &RedirectConfig,
        backend: RedirectBackend,
        namespace: &Namespace,
    ) -> Result<(), RedirectError>;

    /// Removes all redirects.
    fn remove(&self, namespace: &Namespace) -> Result<(), RedirectError>;

    /// Opens connections, and checks whether they are redirected.
    fn probe(
        &self,
        redirect: &RedirectConfig,
        namespace: &Namespace,
    ) -> Result<ProbeOutcome, RedirectError>;

    /// The number of packets that strict rules have dropped.
    fn dropped_packets(&self, namespace: &Namespace) -> Result<u64, RedirectError>;
}

/// The kernel of this host.
#[derive(Debug)]
pub(super) struct HostKernel;

impl RedirectKernel for HostKernel {
    fn namespace_id(&self, namespace: &Namespace) -> NamespaceId {
        namespace.namespace_id()
    }

    fn subscribe(
        &self,
        redirect: &RedirectConfig,
        namespace: &Namespace,
    ) -> Result<Vec<Netlink>, RedirectError> {
        subscribe(redirect, namespace)
    }

    fn resolve(&self, choice: BackendChoice) -> Result<RedirectBackend, RedirectError> {
        choice.resolve()
    }

    fn verify(
        &self,
        redirect: &RedirectConfig,
        backend: RedirectBackend,
        namespace: &Namespace,
    ) -> Result<RedirectState, RedirectError> {
        verify(redirect, backend, namespace)
    }

    fn apply(
        &self,
        redirect: &RedirectConfig,
        backend: RedirectBackend,
        namespace: &Namespace,
    ) -> Result<(), RedirectError> {
        apply(redirect, backend, namespace)
    }

    fn remove(&self, namespace: &Namespace) -> Result<(), RedirectError> {
        remove(namespace)
    }

    fn probe(
        &self,
        redirect: &RedirectConfig,
        namespace: &Namespace,
    ) -> Result<ProbeOutcome, RedirectError> {
        probe(redirect, namespace)
    }

    fn dropped_packets(&self, namespace: &Namespace) -> Result<u64, RedirectError> {
        dropped_packets(namespace)
    }
}
