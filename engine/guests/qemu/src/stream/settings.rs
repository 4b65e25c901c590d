//! QEMU's migration settings: whatever another tool has left there, ours while we move, and back
//! again.
//!
//! Every capability is set, known or not: those that we need on, all others off. Of the parameters,
//! those that can matter to a stream over a descriptor without these capabilities are set to a
//! known value, and the rest is left alone. A parameter that is in neither list is a newer QEMU's:
//! it is left, and said.

use crate::qmp::Qmp;
use crate::stream::QMP_MAX;
use pageferry_engine::error::{Error, Result};
use serde_json::{Map, Value, json};
use std::time::Instant;

/// A TiB a second: no bound.
const BANDWIDTH_UNBOUNDED: u64 = 1 << 40;
/// The longest downtime that QEMU accepts, so that it goes to the end once it is let.
const DOWNTIME_MS_MAX: u64 = 2_000_000;

/// The parameters that can matter, and our values.
fn ours() -> [(&'static str, Value); 9] {
    [
        ("max-bandwidth", json!(BANDWIDTH_UNBOUNDED)),
        ("downtime-limit", json!(DOWNTIME_MS_MAX)),
        // Zero: QEMU reckons with what it measures. With another value it may never think itself
        // ready.
        ("avail-switchover-bandwidth", json!(0)),
        // Our end of the socket speaks no TLS.
        ("tls-creds", json!("")),
        ("tls-hostname", json!("")),
        ("tls-authz", json!("")),
        // cpr-reboot lets the guest arrive in its old run state, and leaves it in postmigrate after
        // an abort.
        ("mode", json!("normal")),
        // Without multifd QEMU takes this for `legacy`: zero pages of video memory are not sent.
        ("zero-page-detection", json!("multifd")),
        ("direct-io", json!(false)),
    ]
}

/// The parameters that cannot matter: each belongs to a capability that is off, or to what QEMU
/// does after the guest runs.
const LEFT_ALONE: &[&str] = &[
    // The network's announcements of a guest that has arrived: the operator's choice.
    "announce-initial",
    "announce-max",
    "announce-rounds",
    "announce-step",
    // auto-converge, dirty-limit
    "throttle-trigger-threshold",
    "cpu-throttle-initial",
    "cpu-throttle-increment",
    "cpu-throttle-tailslow",
    "max-cpu-throttle",
    "x-vcpu-dirty-limit-period",
    "vcpu-dirty-limit",
    // x-colo
    "x-checkpoint-delay",
    // multifd
    "multifd-channels",
    "multifd-compression",
    "multifd-zlib-level",
    "multifd-zstd-level",
    "multifd-qatzip-level",
    // xbzrle, postcopy-ram
    "xbzrle-cache-size",
    "max-postcopy-bandwidth",
    // dirty-bitmaps
    "block-bitmap-mapping",
    // mode cpr-exec (10.2)
    "cpr-exec-command",
    // compress and block, until 9.0
    "compress-level",
    "compress-threads",
    "compress-wait-thread",
    "decompress-threads",
    "block-incremental",
];

/// Migration settings as the operator left them.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct Settings {
    capabilities: Vec<Value>,
    parameters: Map<String, Value>,
}

impl Settings {
    /// Asks QEMU for its settings.
    pub fn read(qmp: &mut Qmp) -> Result<Self> {
        let deadline = Instant::now() + QMP_MAX;
        let capabilities = qmp.execute("query-migrate-capabilities", json!({}), deadline)?;
        let mut parameters = parameters(qmp)?;
        let ours = ours();
        let strange = |name: &&String| {
            !LEFT_ALONE.contains(&name.as_str()) && !ours.iter().any(|(known, _)| known == name)
        };
        let unknown: Vec<_> = parameters.keys().filter(strange).cloned().collect();
        if !unknown.is_empty() {
            tracing::warn!(
                "this QEMU ({}) has migration parameters that pageferry does not know and leaves as they are: {}",
                qmp.version(),
                unknown.join(", ")
            );
        }
        parameters.retain(|name, _| ours.iter().any(|(known, _)| known == name));
        Ok(Self { capabilities: capabilities.as_array().cloned().unwrap_or_default(), parameters })
    }

    /// Makes QEMU's settings ours: `on` on and every other capability off, no bound on bandwidth,
    /// and any downtime allowed, so that QEMU goes to the end once it is let.
    pub fn impose(&self, qmp: &mut Qmp, on: &[&str]) -> Result<()> {
        let known = |name: &str| self.capabilities.iter().any(|c| c["capability"] == name);
        if let Some(missing) = on.iter().find(|name| !known(name)) {
            let version = qmp.version();
            return Err(Error::refused(format!(
                "this QEMU ({version}) does not know {missing}: 8.0 or newer is needed"
            )));
        }
        let wanted = self.capabilities.iter().filter_map(|c| {
            let name = c["capability"].as_str()?;
            let wanted = on.contains(&name);
            (c["state"].as_bool() != Some(wanted))
                .then(|| json!({ "capability": name, "state": wanted }))
        });
        let wanted: Vec<Value> = wanted.collect();
        // Parameters that a QEMU does not have yet are not set.
        let ours = ours().into_iter().filter(|(name, value)| {
            self.parameters.get(*name).is_some_and(|theirs| theirs != value)
        });
        let ours = ours.map(|(name, value)| (name.to_owned(), value)).collect();
        set(qmp, wanted, ours)
    }

    /// Puts everything back as it was.
    pub fn restore(&self, qmp: &mut Qmp) -> Result<()> {
        let deadline = Instant::now() + QMP_MAX;
        let now = qmp.execute("query-migrate-capabilities", json!({}), deadline)?;
        let now = now.as_array().cloned().unwrap_or_default();
        let capabilities: Vec<Value> =
            self.capabilities.iter().filter(|&c| !now.contains(c)).cloned().collect();
        let mut changed = self.parameters.clone();
        let now = parameters(qmp)?;
        changed.retain(|name, value| now.get(name) != Some(value));
        set(qmp, capabilities, changed)
    }
}

/// Only what differs: QEMU reads a long command slowly, and the guest's devices wait meanwhile.
fn set(qmp: &mut Qmp, capabilities: Vec<Value>, parameters: Map<String, Value>) -> Result<()> {
    let deadline = Instant::now() + QMP_MAX;
    if !capabilities.is_empty() {
        qmp.execute("migrate-set-capabilities", json!({ "capabilities": capabilities }), deadline)?;
    }
    if !parameters.is_empty() {
        qmp.execute("migrate-set-parameters", Value::Object(parameters), deadline)?;
    }
    Ok(())
}

fn parameters(qmp: &mut Qmp) -> Result<Map<String, Value>> {
    let all = qmp.execute("query-migrate-parameters", json!({}), Instant::now() + QMP_MAX)?;
    match all {
        Value::Object(all) => Ok(all),
        other => {
            Err(Error::Guest(format!("QEMU's migration parameters are not understood: {other}")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestQemu;

    /// What `query-migrate-parameters` of 8.2 tells.
    const OF_8_2: &str = "announce-initial announce-max announce-rounds announce-step compress-level compress-threads \
        compress-wait-thread decompress-threads throttle-trigger-threshold cpu-throttle-initial cpu-throttle-increment \
        cpu-throttle-tailslow tls-creds tls-hostname tls-authz max-bandwidth avail-switchover-bandwidth downtime-limit \
        x-checkpoint-delay block-incremental multifd-channels xbzrle-cache-size max-postcopy-bandwidth max-cpu-throttle \
        multifd-compression multifd-zlib-level multifd-zstd-level block-bitmap-mapping x-vcpu-dirty-limit-period \
        vcpu-dirty-limit mode";
    /// Of 10.0.
    const OF_10_0: &str = "announce-initial announce-max announce-rounds announce-step throttle-trigger-threshold \
        cpu-throttle-initial cpu-throttle-increment cpu-throttle-tailslow max-cpu-throttle tls-creds tls-hostname tls-authz \
        max-bandwidth avail-switchover-bandwidth downtime-limit x-checkpoint-delay multifd-channels xbzrle-cache-size \
        max-postcopy-bandwidth multifd-compression multifd-zlib-level multifd-zstd-level multifd-qatzip-level \
        block-bitmap-mapping x-vcpu-dirty-limit-period vcpu-dirty-limit mode zero-page-detection direct-io";

    fn known(name: &str) -> bool {
        LEFT_ALONE.contains(&name) || ours().iter().any(|(ours, _)| *ours == name)
    }

    /// All settings of a QEMU.
    fn all(qemu: &mut TestQemu) -> (Value, Value) {
        let mut ask = |command| qemu.qmp.execute(command, json!({}), TestQemu::soon()).unwrap();
        (ask("query-migrate-capabilities"), ask("query-migrate-parameters"))
    }

    #[test]
    fn every_parameter_of_each_qemu_is_known() {
        for name in OF_8_2.split_whitespace().chain(OF_10_0.split_whitespace()) {
            assert!(known(name), "{name}");
        }
        let mut qemu = TestQemu::start(&["-machine", "none"]);
        let (_, parameters) = all(&mut qemu);
        let unknown: Vec<_> =
            parameters.as_object().unwrap().keys().filter(|name| !known(name)).collect();
        assert!(unknown.is_empty(), "of QEMU {}: {unknown:?}", qemu.qmp.version());
    }

    #[test]
    fn whatever_another_tool_has_left_is_ours_meanwhile_and_then_back() {
        let mut qemu = TestQemu::start(&["-machine", "none"]);
        let fresh = all(&mut qemu);
        // Each parameter to another value, each capability on that goes with the others.
        let left = json!({
            "max-bandwidth": 1 << 20, "downtime-limit": 5, "avail-switchover-bandwidth": 1 << 20,
            "tls-creds": "creds0", "tls-hostname": "host", "tls-authz": "authz0", "mode": "cpr-reboot",
            "zero-page-detection": "none", "direct-io": true,
        });
        assert!(
            ours().iter().all(|(name, value)| left.get(name).is_some_and(|other| other != value))
        );
        let left: Map<_, _> = left
            .as_object()
            .unwrap()
            .clone()
            .into_iter()
            .filter(|(name, _)| fresh.1.get(name).is_some())
            .collect();
        qemu.qmp.execute("migrate-set-parameters", Value::Object(left), TestQemu::soon()).unwrap();
        let on = [
            "multifd",
            "return-path",
            "auto-converge",
            "pause-before-switchover",
            "release-ram",
            "dirty-bitmaps",
        ];
        let on = on.map(|name| json!({ "capability": name, "state": true }));
        qemu.qmp
            .execute("migrate-set-capabilities", json!({ "capabilities": on }), TestQemu::soon())
            .unwrap();
        let before = all(&mut qemu);

        let settings = Settings::read(&mut qemu.qmp).unwrap();
        settings.impose(&mut qemu.qmp, &["x-ignore-shared", "events"]).unwrap();
        let (capabilities, parameters) = all(&mut qemu);
        let is_on: Vec<_> = capabilities
            .as_array()
            .unwrap()
            .iter()
            .filter(|c| c["state"] == true)
            .map(|c| c["capability"].as_str().unwrap())
            .collect();
        assert_eq!(is_on, ["events", "x-ignore-shared"]);
        for (name, value) in ours().iter().filter(|(name, _)| fresh.1.get(name).is_some()) {
            assert_eq!(&parameters[name], value, "{name}");
        }

        settings.restore(&mut qemu.qmp).unwrap();
        assert_eq!(all(&mut qemu), before);
    }
}
