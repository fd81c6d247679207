//! Errors and warnings about `mesh.yaml`, each with the path of its field.

/// An error or a warning, and the path of its field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Diagnostic {
    pub(crate) path: String,
    pub(crate) reason: String,
    /// What the field refers to. If that part of the file cannot be read, it is unknown whether the reference is an error.
    pub(crate) refers_to: Option<Reference>,
}

/// A name by which one part of the file refers to another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Reference {
    /// A service or its ports.
    Service(String),
    /// A token issuer.
    Issuer(String),
}

/// Collects errors or warnings.
#[derive(Default)]
pub(crate) struct Diagnostics(pub(super) Vec<Diagnostic>);

impl Diagnostics {
    pub(super) fn add(&mut self, path: impl Into<String>, reason: impl Into<String>) {
        self.0.push(Diagnostic { path: path.into(), reason: reason.into(), refers_to: None });
    }

    /// Adds an error about a reference to a service or its ports.
    pub(super) fn add_reference(
        &mut self,
        service: &str,
        path: impl Into<String>,
        reason: impl Into<String>,
    ) {
        let refers_to = Some(Reference::Service(service.to_owned()));
        self.0.push(Diagnostic { path: path.into(), reason: reason.into(), refers_to });
    }

    /// Adds an error about a reference to an unknown issuer.
    pub(super) fn add_unknown_issuer(&mut self, issuer: &str, path: String) {
        let reason = format!("unknown issuer {issuer:?}");
        let refers_to = Some(Reference::Issuer(issuer.to_owned()));
        self.0.push(Diagnostic { path, reason, refers_to });
    }
}

pub(super) fn unknown_service(name: &str) -> String {
    format!("unknown service {name:?}")
}
