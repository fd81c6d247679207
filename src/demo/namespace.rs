//! The user, network, mount and PID namespaces of the demo.
//!
//! The first process creates the namespaces and starts itself again inside. That second process is PID 1 of the PID
//! namespace, so the kernel kills all its children when it ends.

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::unistd::{getgid, getuid};

use super::output::line;

/// Creates the namespaces, runs the demo in them and waits for it.
pub(super) fn enter() -> Result<(), String> {
    let uid = getuid();
    let gid = getgid();
    let spaces = CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWPID;
    if uid.is_root() {
        unshare(spaces).map_err(|error| format!("cannot create namespaces: {error}"))?;
    } else {
        if unshare(spaces | CloneFlags::CLONE_NEWUSER).is_err() {
            return with_sudo();
        }
        map("setgroups", "deny")?;
        map("uid_map", &format!("0 {uid} 1"))?;
        map("gid_map", &format!("0 {gid} 1"))?;
    }
    let own = std::env::current_exe().map_err(|error| error.to_string())?;
    let mut inside = Command::new(own);
    inside.args(std::env::args_os().skip(1)).arg("--inside");
    let path = std::env::var("PATH").unwrap_or_default();
    if path.split(':').any(|folder| folder == "/usr/bin") {
        // Debian keeps ip, nft and iptables where an ordinary user's PATH does not look.
        inside.env("PATH", format!("{path}:/usr/sbin:/sbin"));
    }
    let status = inside.status().map_err(|error| format!("cannot start the demo: {error}"))?;
    if status.success() { Ok(()) } else { Err("the demo failed; see the output above".into()) }
}

fn map(file: &str, text: &str) -> Result<(), String> {
    fs::write(format!("/proc/self/{file}"), text)
        .map_err(|error| format!("/proc/self/{file}: {error}"))
}

/// Prints the setting that forbids user namespaces, and runs the demo with sudo.
fn with_sudo() -> Result<(), String> {
    let setting = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    let mut reason = "user namespaces are disabled on this host".to_owned();
    if setting("/proc/sys/kernel/apparmor_restrict_unprivileged_userns") == "1" {
        reason += ": sysctl kernel.apparmor_restrict_unprivileged_userns is 1";
    } else if setting("/proc/sys/kernel/unprivileged_userns_clone") == "0" {
        reason += ": sysctl kernel.unprivileged_userns_clone is 0";
    } else if setting("/proc/sys/user/max_user_namespaces") == "0" {
        reason += ": sysctl user.max_user_namespaces is 0";
    }
    line(&format!("{reason}; running with sudo instead"));
    let own = std::env::current_exe().map_err(|error| error.to_string())?;
    let mut sudo = Command::new("sudo");
    sudo.arg(own).args(std::env::args_os().skip(1));
    // Returns only when it could not be done.
    let error = sudo.exec();
    Err(format!("{reason}; cannot run sudo: {error}"))
}

/// Prepares mounts and signals. Must be called first inside the namespaces.
pub(super) fn settle() -> Result<(), String> {
    set_pdeathsig(Signal::SIGKILL).map_err(|error| error.to_string())?;
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .map_err(|error| format!("cannot make the mounts private: {error}"))?;
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), none)
        .map_err(|error| format!("cannot mount a private /run: {error}"))?;
    end_on_signals()
}

/// Installs signal handlers: PID 1 of a namespace has no default ones.
fn end_on_signals() -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| error.to_string())?;
    let signals = move || {
        runtime.block_on(async {
            use tokio::signal::unix::{SignalKind, signal};
            let (Ok(mut interrupt), Ok(mut terminate)) =
                (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
            else {
                return;
            };
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            line("\nstopped; all namespaces are removed");
            std::process::exit(130);
        });
    };
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(signals)
        .map(drop)
        .map_err(|error| error.to_string())
}
