//! Cgroup limits. Zero means "not given"; -1 means "no limit" and is kept.

use libcontainer::oci_spec::runtime::LinuxResources;
use protocols::oci;
use serde_json::{Map, Value, json};

use super::{insert_unless, parse};
use crate::error::Result;

/// Converts the limits of an update.
///
/// # Errors
/// A value the OCI specification does not know.
pub(crate) fn resources(source: &oci::LinuxResources) -> Result<LinuxResources> {
    parse("OCI resources", json_form(source))
}

pub(super) fn json_form(source: &oci::LinuxResources) -> Value {
    let mut value = Map::new();
    if let Some(memory) = source.Memory.as_ref() {
        let mut section = Map::new();
        for (key, limit) in [
            ("limit", memory.Limit),
            ("reservation", memory.Reservation),
            ("swap", memory.Swap),
        ] {
            insert_unless(&mut section, key, limit == 0, json!(limit));
        }
        value.insert("memory".into(), Value::Object(section));
    }
    if let Some(cpu) = source.CPU.as_ref() {
        let mut section = Map::new();
        insert_unless(&mut section, "shares", cpu.Shares == 0, json!(cpu.Shares));
        insert_unless(&mut section, "quota", cpu.Quota == 0, json!(cpu.Quota));
        insert_unless(&mut section, "period", cpu.Period == 0, json!(cpu.Period));
        insert_unless(&mut section, "cpus", cpu.Cpus.is_empty(), json!(cpu.Cpus));
        insert_unless(&mut section, "mems", cpu.Mems.is_empty(), json!(cpu.Mems));
        value.insert("cpu".into(), Value::Object(section));
    }
    if let Some(pids) = source.Pids.as_ref().filter(|pids| pids.Limit != 0) {
        value.insert("pids".into(), json!({ "limit": pids.Limit }));
    }
    if let Some(block) = source.BlockIO.as_ref() {
        value.insert("blockIO".into(), block_io(block));
    }
    let huge: Vec<Value> = source
        .HugepageLimits
        .iter()
        .map(|limit| json!({ "pageSize": limit.Pagesize, "limit": limit.Limit }))
        .collect();
    insert_unless(&mut value, "hugepageLimits", huge.is_empty(), json!(huge));
    Value::Object(value)
}

fn block_io(source: &oci::LinuxBlockIO) -> Value {
    let mut section = Map::new();
    insert_unless(
        &mut section,
        "weight",
        source.Weight == 0,
        json!(source.Weight),
    );
    let weights: Vec<Value> = source
        .WeightDevice
        .iter()
        .map(|device| {
            json!({ "major": device.Major, "minor": device.Minor, "weight": device.Weight })
        })
        .collect();
    insert_unless(
        &mut section,
        "weightDevice",
        weights.is_empty(),
        json!(weights),
    );
    for (key, devices) in [
        ("throttleReadBpsDevice", &source.ThrottleReadBpsDevice),
        ("throttleWriteBpsDevice", &source.ThrottleWriteBpsDevice),
        ("throttleReadIOPSDevice", &source.ThrottleReadIOPSDevice),
        ("throttleWriteIOPSDevice", &source.ThrottleWriteIOPSDevice),
    ] {
        let rates: Vec<Value> = devices
            .iter()
            .map(|device| {
                json!({ "major": device.Major, "minor": device.Minor, "rate": device.Rate })
            })
            .collect();
        insert_unless(&mut section, key, rates.is_empty(), json!(rates));
    }
    Value::Object(section)
}
