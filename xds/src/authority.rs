//! The certificate service: a request goes in, a certificate chain comes out.
//!
//! The shape is Istio's `istio.v1.auth.IstioCertificateService`, so its agents and ours are
//! interchangeable. Here is only the transport; who may have which certificate is decided behind
//! [`CertificateSigner`].

use std::sync::Arc;

use tonic::metadata::{Ascii, MetadataValue};
use tonic::{Request, Response, Status};
use weft_model::SpiffeId;

use crate::dial::Dialer;
use crate::server::{Peer, RequestGate};
use generated::istio_certificate_service_client::IstioCertificateServiceClient;
use generated::istio_certificate_service_server::{
    IstioCertificateService, IstioCertificateServiceServer,
};
use generated::{IstioCertificateRequest, IstioCertificateResponse};

#[allow(
    missing_docs,
    unreachable_pub,
    unused_qualifications,
    clippy::all,
    clippy::allow_attributes_without_reason,
    reason = "generated code"
)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/istio.v1.auth.rs"));
}

/// Who asks for a certificate, as far as it could be proved.
#[derive(Debug, Clone, Default)]
pub struct Applicant {
    /// The id of its present certificate, proved by mutual TLS.
    pub peer: Option<SpiffeId>,
    /// The bearer token it sent.
    pub token: Option<String>,
}

/// Why a certificate is not given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SignError {
    /// The applicant proved nothing that entitles it.
    Denied(String),
    /// The request itself is wrong.
    Invalid(String),
    /// The authority cannot sign now.
    Unavailable(String),
}

impl std::fmt::Display for SignError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Denied(text) | Self::Invalid(text) | Self::Unavailable(text) => f.write_str(text),
        }
    }
}

/// Decides and signs.
pub trait CertificateSigner: Send + Sync + 'static {
    /// Gives the chain for a PEM request: the leaf first, the root last.
    ///
    /// # Errors
    /// Why not.
    fn sign(&self, applicant: &Applicant, request_pem: &str) -> Result<Vec<String>, SignError>;

    /// Whether an applicant may ask at all: its request is not read otherwise. Nothing is used up by that.
    ///
    /// # Errors
    /// Why not.
    fn admits(&self, applicant: &Applicant) -> Result<(), SignError>;
}

/// Lets in those who may ask.
pub(crate) fn gate<S: CertificateSigner>(signer: Arc<S>) -> RequestGate {
    Arc::new(move |head| {
        let peer = head.extensions.get::<Peer>().and_then(|peer| peer.id.clone());
        let token = head.headers.get(http::header::AUTHORIZATION);
        let token = bearer(token.and_then(|value| value.to_str().ok()));
        signer.admits(&Applicant { peer, token }).map_err(Status::from)
    })
}

fn bearer(value: Option<&str>) -> Option<String> {
    value?.strip_prefix("Bearer ").map(str::to_owned)
}

impl From<SignError> for Status {
    fn from(error: SignError) -> Self {
        match error {
            SignError::Denied(text) => Self::permission_denied(text),
            SignError::Invalid(text) => Self::invalid_argument(text),
            SignError::Unavailable(text) => Self::unavailable(text),
        }
    }
}

/// The service around a [`CertificateSigner`].
#[derive(Debug)]
pub(crate) struct CertificateService<S>(pub(crate) Arc<S>);

impl<S: CertificateSigner> CertificateService<S> {
    pub(crate) fn new(signer: Arc<S>) -> IstioCertificateServiceServer<Self> {
        IstioCertificateServiceServer::new(Self(signer))
    }
}

#[tonic::async_trait]
impl<S: CertificateSigner> IstioCertificateService for CertificateService<S> {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let peer = request.extensions().get::<Peer>().and_then(|peer| peer.id.clone());
        let token = request.metadata().get("authorization");
        let token = bearer(token.and_then(|value| value.to_str().ok()));
        let signed = self.0.sign(&Applicant { peer, token }, &request.get_ref().csr)?;
        Ok(Response::new(IstioCertificateResponse { cert_chain: signed }))
    }
}

/// Asks the authority behind `dial` to sign a request. `token` proves who we are until we hold a
/// first certificate.
///
/// # Errors
/// [`SignError::Denied`] and [`SignError::Invalid`] are final; the other is worth another try.
pub async fn request_certificate(
    dial: &Dialer,
    request_pem: String,
    token: Option<&str>,
) -> Result<Vec<String>, SignError> {
    let mut request =
        Request::new(IstioCertificateRequest { csr: request_pem, validity_duration: 0 });
    if let Some(token) = token {
        let value: MetadataValue<Ascii> = format!("Bearer {token}").parse().map_err(|_| {
            SignError::Invalid("the join token has characters that no header may have".into())
        })?;
        request.metadata_mut().insert("authorization", value);
    }
    let mut client = IstioCertificateServiceClient::new(dial.channel());
    match client.create_certificate(request).await {
        Ok(response) => Ok(response.into_inner().cert_chain),
        Err(status) => {
            let text = crate::client::explain(&status);
            Err(match status.code() {
                tonic::Code::PermissionDenied | tonic::Code::Unauthenticated => {
                    SignError::Denied(text)
                }
                tonic::Code::InvalidArgument => SignError::Invalid(text),
                _ => SignError::Unavailable(text),
            })
        }
    }
}
