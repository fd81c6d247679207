//! Hash maps on the request path with keys from the configuration.

use std::collections::HashMap;

/// A map with keys from the configuration, such as cluster names and endpoint addresses. Its hash costs a fifth of the
/// standard one and is weaker against keys that an attacker chooses: never use what a client sends as a key.
pub(crate) type ConfigMap<K, V> = HashMap<K, V, foldhash::fast::RandomState>;
