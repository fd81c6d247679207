//! The rotation of the root, step by step while everything else happens.

use weft_integration::mesh::TestMesh;
use weft_integration::process::weft;
use weft_integration::wait::{eventually, within_certificate_lifetime};

/// How far the rotation has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// One root is trusted.
    Before,
    /// The next root is trusted as well.
    Announced,
    /// The next root signs.
    Signs,
    /// Peers no longer trust the former root.
    Done,
}

/// A rotation of the root.
#[derive(Debug)]
pub(crate) struct Rotation {
    step: Step,
    /// Why the last step was refused.
    refusal: String,
}

/// Runs `weft ca`.
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

    /// Takes the next step, if its time has come.
    pub(crate) fn advance(&mut self, mesh: &TestMesh) {
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

    /// Takes the rotation to its end.
    ///
    /// # Panics
    /// When a step is refused for longer than certificates live.
    pub(crate) fn complete(&mut self, mesh: &TestMesh) {
        within_certificate_lifetime("the former root is taken back", || {
            self.advance(mesh);
            (self.step == Step::Done).then_some(())
        });
    }

    /// How far it has come, for people.
    pub(crate) fn progress(&self) -> String {
        match self.step {
            Step::Signs => format!("the next root signs; {}", self.refusal),
            Step::Before | Step::Announced | Step::Done => format!("{:?}", self.step),
        }
    }

    /// Whether the next root signs.
    pub(crate) fn has_followed(&self) -> bool {
        matches!(self.step, Step::Signs | Step::Done)
    }
}
