//! The names of resources, services and policies.

/// The name of a resource, a service or a policy: shared, never copied on the request path.
pub type Name = std::sync::Arc<str>;
