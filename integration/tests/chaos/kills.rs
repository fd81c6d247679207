//! The kills: which process is killed, by which signal, and during which time requests may fail because of it.

use nix::sys::signal::Signal;
use weft_integration::role_process::RoleProcess;

use crate::ca_rotation::Rotation;
use crate::changes::MeshFile;
use crate::tally::{Tally, Victim, now};
use crate::testbed::Testbed;

/// A process and the signal that ends it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kill {
    /// SIGKILL of a sidecar: requests in flight there may fail.
    SidecarKilled,
    /// SIGKILL of the control plane: no request may fail.
    ControlKilled,
    /// SIGKILL, without removing the endpoint first, of the program that serves HTTP/1.1 and the echoes: requests to
    /// that endpoint may fail until the next process is ready.
    ProgramKilled,
    /// SIGKILL of the agent: flows that the kernel forwards may not fail.
    AgentKilled,
    /// SIGTERM of a sidecar: no request may fail.
    SidecarStopped,
    /// SIGKILL of a gRPC program.
    GrpcKilled,
    /// SIGTERM of the control plane: no request may fail.
    ControlStopped,
    /// SIGKILL of a program whose endpoint was removed from the mesh before: no request may fail.
    ProgramRestarted,
    /// SIGTERM of the agent: flows that the kernel forwards may not fail.
    AgentStopped,
    /// SIGKILL of a WebSocket program.
    WebSocketKilled,
}

/// Every kill, in the order in which the test repeats them.
pub(crate) const KILLS: [Kill; 10] = [
    Kill::SidecarKilled,
    Kill::ControlKilled,
    Kill::ProgramKilled,
    Kill::AgentKilled,
    Kill::SidecarStopped,
    Kill::GrpcKilled,
    Kill::ControlStopped,
    Kill::ProgramRestarted,
    Kill::AgentStopped,
    Kill::WebSocketKilled,
];

/// The state that a kill needs.
pub(crate) struct Killer<'k> {
    pub(crate) testbed: &'k mut Testbed,
    pub(crate) tally: &'k Tally,
    pub(crate) file: &'k MeshFile,
    pub(crate) rotation: Rotation,
}

impl Killer<'_> {
    /// Ends a process of that endpoint, or the only one of its kind, and starts it again. Waits until all kinds of
    /// traffic are served.
    pub(crate) fn kill(&mut self, kill: Kill, endpoint: usize) {
        let from = now();
        let victim = match kill {
            Kill::SidecarKilled | Kill::SidecarStopped => {
                self.end_sidecar(kill, endpoint);
                None
            }
            Kill::ControlKilled | Kill::ControlStopped => {
                self.end_control(kill);
                None
            }
            Kill::AgentKilled | Kill::AgentStopped => {
                let agent = &mut self.testbed.mesh.agent;
                assert_not_panicked(agent);
                if kill == Kill::AgentStopped {
                    stop(agent);
                }
                agent.restart();
                Some(Victim::Agent)
            }
            Kill::ProgramKilled => {
                self.testbed.restart_program(endpoint);
                Some(Victim::Program)
            }
            Kill::ProgramRestarted => {
                self.file.remove_endpoint(endpoint, &self.testbed.mesh);
                // Sessions that began before the removal finish.
                self.tally.wait_until_all_served();
                self.testbed.restart_program(endpoint);
                self.file.add_endpoint();
                None
            }
            Kill::GrpcKilled => {
                self.testbed.restart_grpc(endpoint);
                Some(Victim::GrpcProgram)
            }
            Kill::WebSocketKilled => {
                self.testbed.restart_websocket(endpoint);
                Some(Victim::WebSocketProgram)
            }
        };
        if let Some(victim) = victim {
            self.tally.add_outage(victim, from, now());
        }
        self.tally.wait_until_all_served();
    }

    fn end_sidecar(&mut self, kill: Kill, endpoint: usize) {
        let endpoint = self.testbed.mesh.orders.get_mut(endpoint).expect("the endpoint exists");
        let sidecar = &mut endpoint.sidecar;
        assert_not_panicked(sidecar);
        let from = now();
        if kill == Kill::SidecarStopped {
            stop(sidecar);
        } else {
            sidecar.process.kill();
            self.tally.add_outage(Victim::Sidecar, from, now());
        }
        sidecar.restart();
    }

    fn end_control(&mut self, kill: Kill) {
        let mesh = &mut self.testbed.mesh;
        assert_not_panicked(&mesh.control);
        if kill == Kill::ControlStopped {
            stop(&mut mesh.control);
        } else {
            mesh.control.process.kill();
        }
        self.file.while_valid(|| mesh.control.restart());
    }
}

/// Ends a role by SIGTERM.
fn stop(role: &mut RoleProcess) {
    role.process.signal(Signal::SIGTERM);
    role.process.ended();
}

/// Asserts that a process has logged no panic.
pub(crate) fn assert_not_panicked(role: &RoleProcess) {
    assert!(!role.process.errors().contains("panicked"), "{role:?} panicked");
}
