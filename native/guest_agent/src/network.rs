//! Network.
use crate::error::{AgentError, Result};
use crate::device::Devices;
use protocols::agent::*;
use protocols::agent_types::Interface;
pub(crate) async fn update_interface(_r: UpdateInterfaceRequest, _d: &Devices) -> Result<Interface> { Err(AgentError::Unimplemented("UpdateInterface")) }
pub(crate) async fn update_routes(_r: UpdateRoutesRequest) -> Result<Routes> { Err(AgentError::Unimplemented("UpdateRoutes")) }
pub(crate) async fn list_interfaces() -> Result<Interfaces> { Err(AgentError::Unimplemented("")) }
pub(crate) async fn list_routes() -> Result<Routes> { Err(AgentError::Unimplemented("")) }
pub(crate) async fn add_neighbors(_r: AddARPNeighborsRequest) -> Result<()> { Err(AgentError::Unimplemented("")) }
