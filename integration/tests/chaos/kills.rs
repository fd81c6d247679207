//! The kills: which process ends in which way, and in what time requests may fail for it.

use nix::sys::signal::Signal;
use weft_integration::role_process::RoleProcess;

use crate::ca_rotation::Rotation;
use crate::changes::MeshFile;
use crate::stage::Stage;
use crate::tally::{Tally, Victim, now};

/// What happens to a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kill {
    /// SIGKILL of a sidecar: what is in flight there may fail.
    SidecarKilled,
    /// SIGKILL of the control plane: nothing may fail.
    ControlKilled,
    /// SIGKILL of the program of HTTP/1.1 and of the echo programs, without a warning to callers: what is sent there may
    /// fail until the next one is ready.
    ProgramKilled,
    /// SIGKILL of the agent: what the kernel forwards may not fail.
    AgentKilled,
    /// SIGTERM of a sidecar: nothing may fail.
    SidecarStopped,
    /// SIGKILL of a gRPC program.
    GrpcKilled,
    /// SIGTERM of the control plane: nothing may fail.
    ControlStopped,
    /// SIGKILL of a program whose replica was taken out of the mesh before: nothing may fail.
    ProgramRestarted,
    /// SIGTERM of the agent: what the kernel forwards may not fail.
    AgentStopped,
    /// SIGKILL of a WebSocket program.
    WebSocketKilled,
}

/// Every kill, in the order in which they are made, again and again.
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

/// What a kill needs.
pub(crate) struct Killer<'k> {
    pub(crate) stage: &'k mut Stage,
    pub(crate) tally: &'k Tally,
    pub(crate) file: &'k MeshFile,
    pub(crate) rotation: Rotation,
}

impl Killer<'_> {
    /// Ends a process of that replica, or the one of its kind, and starts it again; waits until all traffic is
    /// served.
    pub(crate) fn kill(&mut self, kill: Kill, replica: usize) {
        let from = now();
        let victim = match kill {
            Kill::SidecarKilled | Kill::SidecarStopped => {
                self.end_sidecar(kill, replica);
                None
            }
            Kill::ControlKilled | Kill::ControlStopped => {
                self.end_control(kill);
                None
            }
            Kill::AgentKilled | Kill::AgentStopped => {
                let agent = &mut self.stage.mesh.agent;
                assert_sound(agent);
                if kill == Kill::AgentStopped {
                    stop(agent);
                }
                agent.restart();
                Some(Victim::Agent)
            }
            Kill::ProgramKilled => {
                self.stage.restart_program(replica);
                Some(Victim::Program)
            }
            Kill::ProgramRestarted => {
                self.file.take_out(replica, &self.stage.mesh);
                // Sessions that began before end by themselves.
                self.tally.await_all();
                self.stage.restart_program(replica);
                self.file.bring_back();
                None
            }
            Kill::GrpcKilled => {
                self.stage.restart_grpc(replica);
                Some(Victim::GrpcProgram)
            }
            Kill::WebSocketKilled => {
                self.stage.restart_websocket(replica);
                Some(Victim::WebSocketProgram)
            }
        };
        if let Some(victim) = victim {
            self.tally.was_out(victim, from, now());
        }
        self.tally.await_all();
    }

    fn end_sidecar(&mut self, kill: Kill, replica: usize) {
        let replica = self.stage.mesh.orders.get_mut(replica).expect("there is such a replica");
        let sidecar = &mut replica.sidecar;
        assert_sound(sidecar);
        let from = now();
        if kill == Kill::SidecarStopped {
            stop(sidecar);
        } else {
            sidecar.process.kill();
            self.tally.was_out(Victim::Sidecar, from, now());
        }
        sidecar.restart();
    }

    fn end_control(&mut self, kill: Kill) {
        let mesh = &mut self.stage.mesh;
        assert_sound(&mesh.control);
        if kill == Kill::ControlStopped {
            stop(&mut mesh.control);
        } else {
            mesh.control.process.kill();
        }
        self.file.while_good(|| mesh.control.restart());
    }
}

/// Ends a role by SIGTERM.
fn stop(role: &mut RoleProcess) {
    role.process.signal(Signal::SIGTERM);
    role.process.ended();
}

/// Holds that a role has not panicked, as long as it can be seen.
pub(crate) fn assert_sound(role: &RoleProcess) {
    assert!(!role.process.errors().contains("panicked"), "{role:?} panicked");
}
