//! The rotation of the root, step by step while everything else happens.

use weft_integration::mesh::Mesh;
use weft_integration::mesh_pki::{spiffe_id, text};
use weft_integration::process::weft;
use weft_integration::wait::{eventually, in_due_time};

use crate::stage::Addresses;

/// How far the rotation has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// One root is trusted.
    Before,
    /// The next root is trusted as well.
    Announced,
    /// The next root signs.
    Signs,
    /// The client without a sidecar has a certificate of the next root.
    Renewed,
    /// Its former certificate is revoked, which would be good for a day.
    Revoked,
    /// The former root is no longer trusted.
    Done,
}

/// A rotation of the root.
#[derive(Debug)]
pub(crate) struct Rotation {
    step: Step,
}

/// Runs `weft ca`.
fn ca(mesh: &Mesh, command: &str, words: &[&str]) -> Result<String, String> {
    let mut ca = weft();
    ca.args(["ca", command, "--state"]).arg(mesh.file("state")).args(words);
    let output = ca.output().expect("the command can be started");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

impl Rotation {
    pub(crate) fn new() -> Self {
        Self { step: Step::Before }
    }

    /// Takes the next step, if its time has come.
    pub(crate) fn advance(&mut self, mesh: &Mesh) {
        self.step = match self.step {
            Step::Before => {
                ca(mesh, "rotate", &["root"]).expect("a root can be announced");
                Step::Announced
            }
            Step::Announced => {
                // Those that were killed come back first.
                eventually("all know the next root", || ca(mesh, "rotate", &["next"]).ok());
                Step::Signs
            }
            Step::Renewed => {
                let serial = &mesh.identity.serial;
                ca(mesh, "revoke", &[serial]).expect("a certificate can be revoked");
                Step::Revoked
            }
            Step::Revoked if ca(mesh, "rotate", &["next"]).is_ok() => Step::Done,
            other => other,
        };
    }

    /// Gives the client without a sidecar a certificate of the root that signs, while the control plane is down,
    /// since it alone may use the store.
    pub(crate) fn renew_identity(&mut self, mesh: &mut Mesh, addresses: &Addresses) {
        if self.step != Step::Signs {
            return;
        }
        let prefix = mesh.file("renewed-client");
        let issued = ca(mesh, "issue", &[&spiffe_id("client"), "--out", text(&prefix)]);
        issued.expect("a certificate can be made");
        let identity = &mut mesh.identity;
        identity.certificate = prefix.with_extension("pem");
        identity.key = prefix.with_extension("key");
        addresses.use_identity([identity.certificate.clone(), identity.key.clone()]);
        self.step = Step::Renewed;
    }

    /// Takes the rotation to its end.
    ///
    /// # Panics
    /// When a step is refused for longer than certificates live.
    pub(crate) fn complete(&mut self, mesh: &Mesh) {
        in_due_time("the former root is taken back", || {
            self.advance(mesh);
            (self.step == Step::Done).then_some(())
        });
    }

    /// What is true so far, for people.
    pub(crate) fn progress(&self) -> String {
        format!("{:?}", self.step)
    }
}
