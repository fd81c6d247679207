//! Hash maps of the request path whose keys come from the configuration.

use std::collections::HashMap;

/// A map whose keys come from the configuration: names of clusters, addresses of endpoints. Its hash costs a
/// fifth of the standard one, and resists keys that an attacker chooses less: never key it by what a client sends.
pub(crate) type ConfigMap<K, V> = HashMap<K, V, foldhash::fast::RandomState>;
