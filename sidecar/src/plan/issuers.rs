//! The token issuers of a plan: their keys, and the numbers under which verified tokens are cached.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use weft_certs::{KeySet, KeySetError};
use weft_model::{DataSource, JwtPolicy, JwtProvider, KeySource, Name};
use weft_runtime::problems::Problems;

use super::downloads::{KeySetDownload, KeySetSources};
use super::files::WatchedFiles;
use super::planned_cluster::PlannedCluster;
use crate::authenticate::key_store::{KeyOrigin, KeyStore, RefetchFlag};
use crate::authenticate::{PlannedProvider, TokenFault, TokenPolicy};
use crate::config_map::ConfigMap;

/// The issuers of the last plan. The filter chain is part of the key, because two chains of a listener may give two issuers the
/// same name.
#[derive(Debug, Default)]
pub(super) struct KnownIssuers {
    known: HashMap<IssuerKey, KnownIssuer>,
    /// The last number that was assigned. Numbers are not reused.
    numbers: u64,
}

/// The place of a filter chain in a configuration.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct ChainPlace {
    pub(super) listener: Name,
    /// The number of the chain in its listener.
    pub(super) number: usize,
}

/// The place of a token provider in a configuration.
#[derive(Debug, PartialEq, Eq, Hash)]
struct IssuerKey {
    chain: ChainPlace,
    provider: Name,
}

#[derive(Debug)]
struct KnownIssuer {
    provider: JwtProvider,
    keys: Result<Arc<KeySet>, TokenFault>,
    number: u64,
    /// Whether the plan being built has this issuer.
    is_planned: bool,
}

impl KnownIssuers {
    /// The token policy of a filter chain, with the keys of its providers.
    pub(super) fn tokens(
        &mut self,
        chain: &ChainPlace,
        policy: &Arc<JwtPolicy>,
        inputs: &mut KeyInputs<'_>,
    ) -> TokenPolicy {
        let mut providers = BTreeMap::new();
        for (name, provider) in &policy.providers {
            let place = IssuerKey { chain: chain.clone(), provider: name.clone() };
            let (keys, refetch) = match &provider.keys {
                KeySource::Local(data) => {
                    (inputs.local_keys(&place, data, self.last_good(&place, data)), None)
                }
                KeySource::Http { .. } => inputs.fetched_keys(name, provider),
            };
            let number = self.number(place, provider, &keys);
            let provider = provider.clone();
            providers.insert(name.clone(), PlannedProvider { number, provider, keys, refetch });
        }
        TokenPolicy::new(policy.clone(), providers)
    }

    /// The number of an issuer, which stays the same as long as its settings and keys do.
    fn number(
        &mut self,
        place: IssuerKey,
        provider: &JwtProvider,
        keys: &Result<Arc<KeySet>, TokenFault>,
    ) -> u64 {
        if let Some(known) = self.known.get_mut(&place)
            && known.provider == *provider
            && known.keys == *keys
        {
            known.is_planned = true;
            return known.number;
        }
        self.numbers += 1;
        let number = self.numbers;
        let provider = provider.clone();
        let keys = keys.clone();
        self.known.insert(place, KnownIssuer { provider, keys, number, is_planned: true });
        number
    }

    /// The last good keys of an issuer that reads them from this source.
    fn last_good(&self, place: &IssuerKey, data: &DataSource) -> Option<Arc<KeySet>> {
        let known = self.known.get(place)?;
        let is_same = known.provider.keys == KeySource::Local(data.clone());
        known.keys.clone().ok().filter(|_| is_same)
    }

    /// Drops the issuers that are not in the plan just built.
    pub(super) fn settle(&mut self) {
        self.known.retain(|_, known| std::mem::take(&mut known.is_planned));
    }
}

/// What the keys of issuers are read from, and where what they need is recorded.
pub(super) struct KeyInputs<'a> {
    pub(super) files: &'a mut WatchedFiles,
    pub(super) clusters: &'a ConfigMap<Name, Arc<PlannedCluster>>,
    /// The fetched key sets.
    pub(super) fetched: &'a KeyStore,
    pub(super) sources: &'a mut KeySetSources,
    pub(super) problems: &'a mut Problems,
}

impl KeyInputs<'_> {
    fn local_keys(
        &mut self,
        place: &IssuerKey,
        data: &DataSource,
        last_good: Option<Arc<KeySet>>,
    ) -> Result<Arc<KeySet>, TokenFault> {
        let bytes = self.files.read(data).map_err(KeySetError::Invalid);
        bytes.and_then(|bytes| KeySet::parse(&bytes)).map(Arc::new).or_else(|error| {
            let (fault, reason) = match error {
                KeySetError::TooLarge(reason) => (TokenFault::KeysTooLarge, reason),
                KeySetError::Invalid(reason) => (TokenFault::KeysInvalid, reason),
            };
            let IssuerKey { chain: ChainPlace { listener, .. }, provider: name } = place;
            let problem = format!("listener {listener:?} keys of {name:?}: {reason}");
            match last_good {
                Some(_) => {
                    self.problems.warn(format!("{problem}; the last good keys stay in force"));
                }
                None => self.problems.unserved.push(problem),
            }
            last_good.ok_or(fault)
        })
    }

    fn fetched_keys(
        &mut self,
        name: &Name,
        provider: &JwtProvider,
    ) -> (Result<Arc<KeySet>, TokenFault>, Option<RefetchFlag>) {
        let KeySource::Http { uri, cluster, timeout, cache, redirects } = &provider.keys else {
            return (Err(TokenFault::KeysFailed), None);
        };
        let origin = |tls| KeyOrigin {
            issuer: provider.issuer.clone(),
            uri: uri.clone(),
            cluster: cluster.clone(),
            redirects: *redirects,
            tls,
        };
        let origin = match self.clusters.get(cluster) {
            Some(cluster) => {
                let origin = origin(cluster.settings.tls.clone());
                self.sources.downloads.push(KeySetDownload {
                    origin: origin.clone(),
                    cluster: cluster.clone(),
                    timeout: *timeout,
                    cache: *cache,
                });
                origin
            }
            None => {
                // Fetched keys stay in force until the cluster is back.
                let origin = self.fetched.last_of(origin(None));
                let problem = format!("keys of {name:?}: cluster {cluster:?} does not exist");
                match self.fetched.get(&origin).0 {
                    Ok(_) => {
                        self.problems.warn(format!("{problem}; the last good keys stay in force"));
                    }
                    Err(_) => self.problems.unserved.push(problem),
                }
                origin
            }
        };
        let found = self.fetched.get(&origin);
        self.sources.origins.push(origin);
        found
    }
}
