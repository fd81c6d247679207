//! The rotation of the root CA, step by step, while traffic, changes and kills continue.

use weft_integration::mesh::TestMesh;
use weft_integration::process::weft;
use weft_integration::wait::{eventually, within_certificate_lifetime};

/// The progress of the rotation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// Only the first root is trusted.
    Before,
    /// The next root is trusted as well.
    Announced,
    /// The next root signs.
    Signs,
    /// Peers no longer trust the former root.
    Done,
}

/// A root rotation.
#[derive(Debug)]
pub(crate) struct Rotation {
    step: Step,
    /// The reason for which the last step was refused.
    refusal: String,
}

/// Runs a `weft ca` command. Returns its standard output.
///
/// # Errors
///
/// The standard error of the command when it fails.
pub(crate) fn ca(mesh: &TestMesh, command: &str, words: &[&str]) -> Result<String, String> {
    let mut ca = weft();
    ca.args(["ca", command, "--state"]).arg(mesh.file("state")).args(words);
    let output = ca.output().expect("the command can be started");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

impl Rotation {
    pub(crate) fn new() -> Self {
        Self { step: Step::Before, refusal: String::new() }
    }

    /// Takes the next step, if `weft ca` permits it.
    pub(crate) fn advance(&mut self, mesh: &TestMesh) {
        self.step = match self.step {
            Step::Before => {
                ca(mesh, "rotate", &["root"]).expect("a root can be announced");
                Step::Announced
            }
            Step::Announced => {
                // Data planes that were killed must first start and receive the next root.
                eventually("all data planes have the next root", || {
                    ca(mesh, "rotate", &["next"]).ok()
                });
                Step::Signs
            }
            Step::Signs => match ca(mesh, "rotate", &["next"]) {
                Ok(_) => Step::Done,
                Err(refusal) => {
                    self.refusal = refusal;
                    Step::Signs
                }
            },
            Step::Done => Step::Done,
        };
    }

    /// Completes the rotation.
    ///
    /// # Panics
    /// When a step is refused for longer than certificates live.
    pub(crate) fn complete(&mut self, mesh: &TestMesh) {
        within_certificate_lifetime("the former root is removed", || {
            self.advance(mesh);
            (self.step == Step::Done).then_some(())
        });
    }

    /// The progress, as text.
    pub(crate) fn progress(&self) -> String {
        match self.step {
            Step::Signs => format!("the next root signs; {}", self.refusal),
            Step::Before | Step::Announced | Step::Done => format!("{:?}", self.step),
        }
    }

    /// Whether the next root signs.
    pub(crate) fn has_switched(&self) -> bool {
        matches!(self.step, Step::Signs | Step::Done)
    }
}
